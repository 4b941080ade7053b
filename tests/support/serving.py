"""What can be done with a model, each tried through the public function and compared with something simpler.

A refusal (`ValueError` of the function) is an answer; a wrong result, or another error, fails.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from support.cutting import Looked, a_group, zeroed_outputs
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
from hf_attnkit.models.discovery import Discovery, run_outputs

Inputs = Mapping[str, Any]


class Subject:
    """A model, what is compared with it, and a copy that is changed.

    Attributes:
        found, owned: what attends, and what belongs to its heads.
        copied: the model again, for as long as the last change left no trace.
    """

    def __init__(self, model: PreTrainedModel, looked: Looked) -> None:
        self.model, (self.found, self.owned) = model, looked
        self.copied = copy.deepcopy(model)

    @cached_property
    def stock(self) -> list[Tensor]:
        """What the model puts out."""
        return _outputs(self.model, self.found.inputs)

    def now(self) -> list[Tensor]:
        """What the copy puts out."""
        return _outputs(self.copied, self.found.inputs)


def served(model: PreTrainedModel, looked: Looked) -> str:
    """The names of `CAPABILITIES` that the model has, separated by spaces."""
    names: list[str] = []
    subject = Subject(model, looked)
    for name, attempt in CAPABILITIES.items():
        if name == "alike" and "prune" in names:
            continue
        try:
            attempt(subject)
        except _RefusedError:  # which leaves the copy as it was: what is tried next runs on it
            continue
        names.append(name)
        if name in CUTS and name != LAST:
            subject.copied = copy.deepcopy(model)
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


def _swap(it: Subject) -> None:
    """An exact kind gives what the model gives, and leaves no trace."""
    _tried(swap_attention, it.copied, "flash")
    _assert_close(it.now(), it.stock)
    restore_attention(it.copied)
    assert _are_equal(it.now(), it.stock)


def _window(it: Subject) -> None:
    """A window gives what the model's own attention gives under a band in its mask."""
    try:
        with windows(it.model, 4):
            banded = _outputs(it.model, it.found.inputs)
    except RuntimeError as error:
        raise _RefusedError("its own attention takes no mask, so there is nothing to compare with") from error
    _tried(swap_attention, it.copied, "sliding_window", window=4)
    _assert_close(it.now(), banded)
    restore_attention(it.copied)


def _entropy(it: Subject) -> None:
    _assert_scores(_tried(head_importance, it.copied, [it.found.inputs], method="entropy"), it.found)


def _contribution(it: Subject) -> None:
    _assert_scores(_tried(head_importance, it.copied, [it.found.inputs], method="contribution"), it.found)


def _assert_scores(scores: Tensor, found: Discovery) -> None:
    heads = [each.num_heads for each in found.attentions]
    assert scores.shape == (len(heads), max(heads))
    # Heads that nothing shows: no calls, and no matrix product that takes their outputs.
    heads = [each.num_heads if each.calls_interface or each.output else 0 for each in found.attentions]
    assert sorted(int(row.isfinite().sum()) for row in scores) == sorted(heads)


def _prune(it: Subject) -> None:
    """Without a group of heads the model is the whole one with zeros in their place, also when saved and loaded."""
    attentions = it.found.attentions
    index = next((i for i, own in enumerate(it.owned) if not own.problem and attentions[i].num_heads > 1), 0)
    _assert_pruned(it, {index: a_group(attentions[index].num_heads, it.owned[index])})


def _alike(it: Subject) -> None:
    """The same heads of all attentions, where the model shares something for each head among them."""
    both = zip(it.found.attentions, it.owned, strict=True)
    _assert_pruned(it, {each.index: a_group(each.num_heads, own) for each, own in both})


def _assert_pruned(it: Subject, heads: Mapping[int, list[int]]) -> None:
    _tried(prune_heads, it.copied, {it.found.attentions[index].path: gone for index, gone in heads.items()})
    want = zeroed_outputs(it.model, it.found, it.owned, heads)
    got = it.now()
    _assert_close(got, _real(want, it.found.inputs))
    _assert_reloads(it, got)


def _convert(it: Subject) -> None:
    """With half of its key/value heads the model is smaller, and the same when saved and loaded."""
    _tried(convert_to_gqa, it.copied, budget=0.5)
    assert it.copied.num_parameters() < it.model.num_parameters()
    _assert_reloads(it, it.now())


def _assert_reloads(it: Subject, want: list[Tensor]) -> None:
    again = _saved_and_loaded(it.copied, load_pretrained)
    assert type(again) is type(it.copied)
    got = _outputs(again, it.found.inputs)
    if not _are_equal(got, want):  # some classes start again what they do not save, or tie what was not
        plain = _outputs(_saved_and_loaded(it.model, type(it.model).from_pretrained), it.found.inputs)
        assert not _are_equal(plain, it.stock)


def _saved_and_loaded(model: PreTrainedModel, load: Callable[..., Any]) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again: PreTrainedModel = load(folder, type(model)) if load is load_pretrained else load(folder)
    return again.eval()


# What takes heads away.
CUTS = ("prune", "alike", "convert")
CAPABILITIES: dict[str, Callable[[Subject], None]] = {
    "swap": _swap,
    "window": _window,
    "entropy": _entropy,
    "contribution": _contribution,
    "prune": _prune,
    "alike": _alike,
    "convert": _convert,
}
LAST = [*CAPABILITIES][-1]
