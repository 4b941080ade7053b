"""What is hidden in a text is found by a model that copies, as far back as it looks, and by no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_attnkit.experiment.text import hidden

TEXT = torch.randint(300, 900, (700,), generator=torch.Generator().manual_seed(0))


class Characters:
    """One token for each character."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Copier(nn.Module):
    """After three tokens that were there before, at most `reach` back, comes what came then."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.place = reach, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        (ids,) = input_ids.tolist()
        logits = torch.zeros(1, len(ids), 1000)
        for at in range(2, len(ids)):
            for earlier in range(max(2, at - self.reach), at):
                if ids[earlier - 2 : earlier + 1] == ids[at - 2 : at + 1]:
                    logits[0, at, ids[earlier + 1]] = 1 + earlier
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("form", hidden.FORMS)
@pytest.mark.parametrize(("reach", "share"), [(400, 1.0), (1, 0.0), (120, 0.4)])
def test_share_found(form: str, reach: int, share: float) -> None:
    """About 250 tokens are text, in which five depths are 50 apart: the last two are at most 120 before the end."""
    model: Any = Copier(reach)
    assert hidden.shares_found(model, Characters(), TEXT, form, [300], 2) == {"300": share}


@pytest.mark.parametrize("form", hidden.FORMS)
def test_probes(form: str) -> None:
    found = list(hidden.probes(Characters(), TEXT, form, 200, 3))
    assert len(found) == 15 and all(len(ids) == 200 for ids, _ in found)
    again = list(hidden.probes(Characters(), TEXT, form, 200, 3))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(found, again, strict=True))
    places = []
    for ids, number in found:
        answer = ids[-number:].tolist()
        starts = [at for at in range(200 - number + 1) if ids[at : at + number].tolist() == answer]
        assert len(starts) == 2 and starts[1] == 200 - number  # once hidden, once asked for
        places.append(starts[0])
    assert places[:5] == sorted(places[:5]) and places[0] < 60 and places[4] > 110
    assert len({tuple(ids[-number:].tolist()) for ids, number in found}) == 15
    if form == "passkey":
        text = "".join(map(chr, found[0][0][-21:].tolist()))
        assert text[:-6] == "The pass key is" and text[-5:].isdecimal()


@pytest.mark.parametrize("length", [40, 900])
def test_no_room(length: int) -> None:
    with pytest.raises(ValueError, match=rf"induction in {length} tokens needs -?\d+ tokens of text .* give a length"):
        list(hidden.probes(Characters(), TEXT, "induction", length, 1))
