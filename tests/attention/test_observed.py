"""What observers are told that an implementation attends to is what it attends to, for every kind and every window."""

from __future__ import annotations

import pytest
import torch
from support.matrix import MATRIX
from support.models import batch, build
from support.reference import attend
from support.swapping import build_for, swapped
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit import head_importance, head_statistics
from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.mask import Mask
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.observing.attention_calls import visible_attention

SOFTMAX = [name for name in MATRIX if MATRIX[name].kind.forms_scores]
# Mistral's window is its own; Qwen2's is of its second layer only.
WINDOWS = {"mistral": {"sliding_window": 5}, "qwen2": {"use_sliding_window": True, "sliding_window": 4,
                                                       "max_window_layers": 1}}  # fmt: skip


def require_told(model: PreTrainedModel, options: dict[str, Tensor]) -> None:
    """Softmax under the mask that an observer is told, in float64, is what the output projection is given."""
    layers = {id(layer.module): layer for layer in attention_layers(model)}
    told: list[tuple[int, Tensor, Tensor]] = []
    given: dict[int, Tensor] = {}

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        seen = mask.visible()
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if seen is None else seen
        seen = seen.expand(query.shape[0], -1, query.shape[2], key.shape[2])
        layer = layers[id(module)]
        real = seen.diagonal(dim1=-2, dim2=-1)[:, 0]
        told.append((layer.index, attend(query, key, value, seen, scaling=scaling, bias=mask.bias), real))

    for layer in layers.values():
        layer.output.register_forward_pre_hook(lambda module, args, index=layer.index: given.update({index: args[0]}))
    with torch.no_grad(), visible_attention(model), observe(note):
        model(**options)
    assert len(told) == len(layers)
    for index, expected, real in told:
        found = given[index].unflatten(-1, (expected.shape[1], -1)).transpose(1, 2)
        for row, tokens in zip(range(len(found)), real.expand(len(found), -1), strict=True):
            torch.testing.assert_close(found[row][:, tokens], expected[row][:, tokens], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("name", SOFTMAX)
def test_observers_are_told_what_is_attended_to(name: str, family: str) -> None:
    model = build_for(name, family, **WINDOWS.get(family, {})).double()
    inputs = batch(model)
    require_told(swapped(model, name, **MATRIX[name].options), inputs)
    if name == SOFTMAX[0]:
        require_told(model, inputs)


def test_a_window_is_the_same_to_scores_and_statistics_whichever_kind_has_it() -> None:
    model = build("bert").double()
    inputs = [batch(model)]
    found = []
    for kind in ("sliding_window", "flash"):
        changed = swapped(model, kind, window=3)
        statistics = head_statistics(changed, inputs)
        assert statistics.distance.max() <= 2
        found.append((head_importance(changed, inputs, method="entropy", normalize=False), statistics.entropy))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
