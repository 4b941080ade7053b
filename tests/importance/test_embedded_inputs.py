"""Batches of embeddings instead of token ids are scored as the tokens they are of."""

from __future__ import annotations

import pytest
import torch
from support.models import batch, build

from hf_attnkit import head_importance


@pytest.mark.parametrize(("family", "head"), [("llama", "causal"), ("bert", "token"), ("bert", "question")])
@pytest.mark.parametrize("method", ["gradient", "fisher", "taylor", "contribution", "entropy"])
def test_scores_of_embeddings_are_those_of_their_tokens(family: str, head: str, method: str) -> None:
    model = build(family, head).double()
    inputs = batch(model)
    ids = inputs["input_ids"]
    if head == "question":
        inputs |= {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 4, 5])}
    else:
        inputs |= {"labels": ids if head == "causal" else ids % 2}
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    found, wanted = (head_importance(model, [given], method=method) for given in (embedded, inputs))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_positions_outside_the_embeddings_are_refused() -> None:
    model = build("bert", "question")
    given = {"inputs_embeds": torch.zeros(1, 5, 64), "start_positions": torch.tensor([1]),
             "end_positions": torch.tensor([5])}  # fmt: skip
    with pytest.raises(ValueError, match="outside the 5 tokens"):
        head_importance(model, [given], method="gradient")
