"""What can be done with a model, each tried through the public function and compared with something simpler.

A refusal (`ValueError` of the function) is an answer; a wrong result, or another error, fails.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from support.cutting import a_group, zeroed_outputs
from support.windows import windows
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import (
    convert_to_gqa,
    head_importance,
    load_pretrained,
    prune_heads,
    restore_attention,
    swap_attention,
)
from hf_attnkit.models.discovery import Discovery, discover, run_outputs
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships

Inputs = Mapping[str, Any]


def served(model: PreTrainedModel) -> str:
    """The names of `CAPABILITIES` that the model has, separated by spaces."""
    found = discover(model)
    names = []
    for name, attempt in CAPABILITIES.items():
        if name == "alike" and "prune" in names:
            continue
        copied = copy.deepcopy(model)
        try:
            attempt(copied, model, found)
        except _RefusedError:
            continue
        names.append(name)
    return " ".join(names)


class _RefusedError(Exception):
    """The function that was tried refuses the model."""


def _tried(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except ValueError as error:
        raise _RefusedError(str(error)) from error


def _outputs(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Without what is put out at padding."""
    with torch.no_grad():
        return _real(run_outputs(model, inputs), inputs)


def _real(outputs: list[Tensor], inputs: Inputs) -> list[Tensor]:
    mask = inputs.get("attention_mask")
    return [each[mask.bool()] if mask is not None and each.shape[:2] == mask.shape else each for each in outputs]


def _assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * (1 + float(b.nan_to_num().abs().max())), equal_nan=True)


def _are_equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True))


def _swap(copied: PreTrainedModel, model: PreTrainedModel, found: Discovery) -> None:
    """An exact kind gives what the model gives, and leaves no trace."""
    stock = _outputs(model, found.inputs)
    _tried(swap_attention, copied, "flash")
    _assert_close(_outputs(copied, found.inputs), stock)
    restore_attention(copied)
    assert _are_equal(_outputs(copied, found.inputs), stock)


def _window(copied: PreTrainedModel, model: PreTrainedModel, found: Discovery) -> None:
    """A window gives what the model's own attention gives under a band in its mask."""
    try:
        with windows(model, 4):
            banded = _outputs(model, found.inputs)
    except RuntimeError as error:
        raise _RefusedError("its own attention takes no mask, so there is nothing to compare with") from error
    _tried(swap_attention, copied, "sliding_window", window=4)
    _assert_close(_outputs(copied, found.inputs), banded)


def _entropy(copied: PreTrainedModel, model: PreTrainedModel, found: Discovery) -> None:
    _assert_scores(_tried(head_importance, copied, [found.inputs], method="entropy"), found)


def _contribution(copied: PreTrainedModel, model: PreTrainedModel, found: Discovery) -> None:
    _assert_scores(_tried(head_importance, copied, [found.inputs], method="contribution"), found)


def _assert_scores(scores: Tensor, found: Discovery) -> None:
    heads = [each.num_heads for each in found.attentions]
    assert scores.shape == (len(heads), max(heads))
    assert sorted(int(row.isfinite().sum()) for row in scores) == sorted(heads)


def _prune(copied: PreTrainedModel, model: PreTrainedModel, found: Discovery) -> None:
    """Without a group of heads the model is the whole one with zeros in their place, also when saved and loaded."""
    owned = ownerships(model, found.attentions)
    index = next((i for i, own in enumerate(owned) if not own.problem and found.attentions[i].num_heads > 1), 0)
    _assert_pruned(copied, model, found, owned, {index: a_group(found.attentions[index].num_heads, owned[index])})


def _alike(copied: PreTrainedModel, model: PreTrainedModel, found: Discovery) -> None:
    """The same heads of all attentions, where the model shares something for each head among them."""
    owned = ownerships(model, found.attentions)
    heads = {each.index: a_group(each.num_heads, own) for each, own in zip(found.attentions, owned, strict=True)}
    _assert_pruned(copied, model, found, owned, heads)


def _assert_pruned(
    copied: PreTrainedModel,
    model: PreTrainedModel,
    found: Discovery,
    owned: Sequence[Ownership],
    heads: Mapping[int, list[int]],
) -> None:
    _tried(prune_heads, copied, {found.attentions[index].path: gone for index, gone in heads.items()})
    want = zeroed_outputs(model, found, owned, heads)
    got = _outputs(copied, found.inputs)
    _assert_close(got, _real(want, found.inputs))
    _assert_reloads(copied, model, found.inputs, got)


def _convert(copied: PreTrainedModel, model: PreTrainedModel, found: Discovery) -> None:
    """With half of its key/value heads the model is smaller, and the same when saved and loaded."""
    _tried(convert_to_gqa, copied, budget=0.5)
    got = _outputs(copied, found.inputs)
    assert copied.num_parameters() < model.num_parameters()
    _assert_reloads(copied, model, found.inputs, got)


def _assert_reloads(changed: PreTrainedModel, model: PreTrainedModel, inputs: Inputs, want: list[Tensor]) -> None:
    again = _saved_and_loaded(changed, load_pretrained)
    assert type(again) is type(changed)
    got = _outputs(again, inputs)
    if not _are_equal(got, want):  # some classes start again what they do not save, or tie what was not
        plain = _outputs(_saved_and_loaded(model, type(model).from_pretrained), inputs)
        assert not _are_equal(plain, _outputs(model, inputs))


def _saved_and_loaded(model: PreTrainedModel, load: Callable[..., Any]) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again: PreTrainedModel = load(folder, type(model)) if load is load_pretrained else load(folder)
    return again.eval()


CAPABILITIES: dict[str, Callable[[PreTrainedModel, PreTrainedModel, Discovery], None]] = {
    "swap": _swap,
    "window": _window,
    "entropy": _entropy,
    "contribution": _contribution,
    "prune": _prune,
    "alike": _alike,
    "convert": _convert,
}
