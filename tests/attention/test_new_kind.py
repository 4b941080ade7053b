"""A new kind is one class and one line in the table: swap, proof, save, load, observers and checks follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.models import aligned, batch, build, outputs
from torch import Tensor

from hf_attnkit import attention_backends, head_statistics, load_pretrained, restore_attention, swap_attention
from hf_attnkit.attention.kernels import packed
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.table import KINDS
from hf_attnkit.common.checks import integer
from hf_attnkit.common.options import store


@dataclass(frozen=True)
class Strided(Kind):
    """Every `stride`-th key, and the own one."""

    name = "strided"
    self_attention_only = True

    stride: int
    offset: int = 0

    def __post_init__(self) -> None:
        store(self, stride=integer(self.stride, "stride", minimum=1), offset=integer(self.offset, "offset", minimum=0))

    def seen(self, mask: Mask, shape: torch.Size, call: Call = NO_CALL) -> Mask:
        listed = mask.key_position[:, None, None, :] % self.stride == self.offset
        return mask.as_matrix().also(listed | (mask.distance() == 0))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        scaling: float,
        dropout: float = 0.0,
        call: Call = NO_CALL,
    ) -> tuple[Tensor, None]:
        return packed.attention(query, key, value, self.seen(mask, key.shape), scaling=scaling, dropout=dropout)


@dataclass(frozen=True)
class Near(Strided):
    """With a window, and not a word of its own on what it sees."""

    name = "near"

    stride: int = 1
    window: int = 3
    seen = Kind.seen


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Strided, Near):
        monkeypatch.setitem(KINDS, kind.name, kind)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_new_kind(family: str, tmp_path: Path) -> None:
    model = build(family)
    inputs = batch(model, (12, 7))
    stock = outputs(model, inputs)
    assert torch.allclose(outputs(swap_attention(model, "strided", stride=1), inputs), stock, atol=1e-5)
    swap_attention(model, "strided", stride=3)
    assert list(model.config.hf_attnkit["layers"].values()) == [["strided", {"stride": 3}]] * 2
    expected = outputs(model, inputs)
    assert not torch.allclose(expected, stock, atol=1e-2)

    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert torch.equal(outputs(again, inputs), expected)
    assert attention_backends(again, **inputs) == dict.fromkeys(range(2), ("strided", "no choice"))

    # Observers see the pattern: with the first and the own token alone, no entropy is above ln 2.
    assert head_statistics(restore_attention(model), [inputs]).entropy.max() > math.log(2.2)
    assert head_statistics(swap_attention(again, "strided", stride=1000), [inputs]).entropy.max() <= math.log(2) + 1e-6


def test_a_window_is_seen_without_being_told() -> None:
    model = swap_attention(build("bert"), "near", window=2)
    assert head_statistics(model, [batch(model, (12, 7))]).distance.max() <= 1


def test_its_options_are_checked() -> None:
    model = build("llama")
    for options, message in (
        ({}, "attention 'strided' needs the option stride, for example stride=64"),
        ({"stride": 2, "width": 1}, "attention 'strided' has no option width; it takes stride, offset"),
        ({"stride": 0}, "stride=0 must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_attention(model, "strided", **options)
    with pytest.raises(ValueError, match="'strided' needs queries and keys of one sequence"):
        swap_attention(build("t5"), "strided", stride=2, layers=[5])
