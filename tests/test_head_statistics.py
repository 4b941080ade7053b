"""Head statistics against their definitions on whole attention matrices, and heads that are planted."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import DECODERS, batch, build, reads_both_ways
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import head_statistics
from hf_attnkit.families import attention_layers

LENGTHS = (13, 7, 10)
SEPARATORS = list(range(40, 60))  # of 99 random ids, so that every sequence has some
NAMES = ("entropy", "confidence", "distance", "previous", "next", "first", "separator", "redundancy")


def tolerance(scale: float = 1.0) -> float:
    """Two runs of the model, one in float32: sums of at most 96 terms in each of two layers, scores up to about 20
    (see test_importance), times the largest value that is averaged."""
    return 4 * torch.finfo(torch.float32).eps * 96**0.5 * 20 * scale


def scale(name: str) -> float:
    return {"entropy": math.log(max(LENGTHS)), "distance": float(max(LENGTHS))}.get(name, 1.0)


def definition(p: Tensor, ids: Tensor) -> list[dict[str, list[Tensor]]]:
    """Per head, the values of one sequence's queries. `p` `(heads, n, n)`, float64, of tokens `ids` `(n,)`.

    A key is seen if some head attends to it at all: no float64 weight here underflows.
    """
    n = len(ids)
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in NAMES} for _ in p]
    for head, matrix in enumerate(p):
        for i in range(n):
            seen = [j for j in range(n) if matrix[i, j] > 0]
            if len(seen) < 2:
                continue
            row = matrix[i]
            add = found[head]
            add["entropy"].append(-sum(row[j] * row[j].log() for j in seen))
            add["confidence"].append(row.max())
            add["distance"].append(sum(row[j] * abs(i - j) for j in seen))
            for name, j in (("previous", i - 1), ("next", i + 1), ("first", 0)):
                if j in seen:
                    add[name].append(row[j])
            marked = [j for j in seen if int(ids[j]) in SEPARATORS]
            if marked:
                add["separator"].append(sum(row[j] for j in marked))
            add["redundancy"].append(torch.minimum(p[:, i], row).sum(-1))  # with every head
    return found


def expected(model: PreTrainedModel, inputs: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    """From the matrices of a float64 run of each sequence by itself, `(layers, heads)` each."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    heads = attention_layers(model)[0].num_heads
    values: list[list[dict[str, list[Tensor]]]] = [
        [{name: [] for name in NAMES} for _ in range(heads)] for _ in attention_layers(model)
    ]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row][mask]
        with torch.no_grad():
            matrices = model(ids[None], output_attentions=True).attentions
        for layer, matrix in enumerate(matrices):
            # Transformers takes the eager softmax in float32 in some families; renormalise what it rounds.
            p = matrix[0].double()
            for head, own in enumerate(definition(p / p.sum(-1, keepdim=True), ids)):
                for name in NAMES:
                    values[layer][head][name] += own[name]
    result = {}
    for name in NAMES[:-1]:
        means = [[torch.stack(h[name]).mean() if h[name] else torch.tensor(math.nan) for h in row] for row in values]
        result[name] = torch.tensor([[float(mean) for mean in row] for row in means])
    overlap = torch.stack([torch.stack([torch.stack(h["redundancy"]).mean(0) for h in row]) for row in values])
    overlap.diagonal(dim1=1, dim2=2).fill_(-1)
    result["redundancy"], result["nearest_head"] = overlap.max(-1)
    return result


def close(actual: object, wanted: dict[str, Tensor]) -> None:
    for name in NAMES:
        found = getattr(actual, name).double()
        assert torch.equal(found.isnan(), wanted[name].isnan()), name
        error = (found - wanted[name]).abs().nan_to_num().max()
        assert error <= tolerance(scale(name)), (name, float(error))
    assert torch.equal(actual.nearest_head, wanted["nearest_head"])


@pytest.mark.parametrize("family", ["bert", *DECODERS, "grouped", "gpt2"])
def test_definition(family: str) -> None:
    """Right padding in encoders, left padding in decoders."""
    model = build("llama", "causal", 8, 2) if family == "grouped" else build(family)
    inputs = batch(model, LENGTHS)
    statistics = head_statistics(model, [inputs], separator_ids=SEPARATORS)
    assert statistics.entropy.shape == (2, 8) and statistics.entropy.dtype == torch.float32
    wanted = expected(model, inputs, "eager")
    assert wanted["next"].isnan().all() == (not reads_both_ways(model))
    for name in NAMES:  # heads differ, so that a mixed-up order shows
        if not wanted[name].isnan().all():
            assert wanted[name].max() - wanted[name].min() > 0.05, name
    close(statistics, wanted)
