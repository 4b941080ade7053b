"""`describe_attention`: what a model's attention is, and what can be done with it; where not, why.

What the attention is, the model says by running, see `models.discovery`. What can be done with it is tried: each
change is made to a twin of the model that has the same weights, so "yes" means that it was done and proven, and a
reason is what the change raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_attnkit.analysis.trials import Trials
from hf_attnkit.attention.cache_bytes import bytes_of_attention
from hf_attnkit.attention.consistency import bases
from hf_attnkit.attention.kind import ATTRIBUTE, Kind
from hf_attnkit.common.text_table import text_table
from hf_attnkit.models import known
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import Discovery, discover
from hf_attnkit.models.layers import without_heads
from hf_attnkit.models.ownership import ownerships, signature
from hf_attnkit.models.rotary_pairs import rotary_pairs
from hf_attnkit.models.whole import searched_once


@dataclass(frozen=True)
class AttentionRow:
    """One attention; what can be done with it is told by an empty string, and else by the reason why not.

    Attributes:
        path: of the module that attends.
        calls_interface: whether it attends through Transformers' interface; else what it sees is not known.
        num_heads, num_key_value_heads: of them the key/value heads that have parameters of their own.
        head_dim, value_head_dim: size of a head of queries and keys, and of values.
        is_causal, is_cross, window: see `hf_attnkit.models.attention.Attention`.
        rotary: "half", "interleaved" or "other"; empty where keys are not rotated, or it cannot be told.
        rotated: components of a head that are rotated.
        runs: the kind of attention with its options, or Transformers' implementation.
        swap: another attention in its place (tried: "flash").
        score: of the model's heads by entropy, contribution and magnitude. Scores of the loss need a model that has
            one.
        prune: a group of heads removed.
        convert: key/value heads merged.
        alike: of "prune" and "convert" what is possible only with the same numbers in all attentions like it.
    """

    path: str
    calls_interface: bool
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    is_causal: bool
    is_cross: bool
    window: int | None
    rotary: str
    rotated: int
    runs: str
    swap: str
    score: str
    prune: str
    convert: str
    alike: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionReport:
    """What `describe_attention` found; `print` it for a table.

    Attributes:
        model: the model's class.
        dtype: of its parameters.
        rows: one for each attention, numbered as `swap_attention`, `head_importance` and `prune_heads` do.
        kinds: what can be swapped into all of those that can be swapped, with its options.
        key_value_heads: numbers that all attentions can be converted to.
        bytes_per_token: what a token adds to the cache in all layers, see `cache_bytes_per_token`.
        not_run: paths of models inside that the inputs did not reach, of which nothing is known.
    """

    model: str
    dtype: str
    rows: tuple[AttentionRow, ...]
    kinds: tuple[str, ...]
    key_value_heads: tuple[int, ...]
    bytes_per_token: int
    not_run: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons: list[str] = []

        def cell(row: AttentionRow, what: str) -> str:
            reason = getattr(row, what)
            if not reason:
                return "alike" if what in row.alike else "yes"
            if reason not in reasons:
                reasons.append(reason)
            return f"no [{reasons.index(reason) + 1}]"

        changes = ("swap", "score", "prune", "convert")
        header = ("layer", "module", "query heads", "key/value heads", "head size", "sees", "rotary", "attention")
        table = [
            (
                str(index), row.path, str(row.num_heads), str(row.num_key_value_heads), _size(row), _sees(row),
                f"{row.rotary} {row.rotated}/{row.head_dim}" if row.rotary else "", row.runs,
                *(cell(row, what) for what in changes),
            )
            for index, row in enumerate(self.rows)
        ]  # fmt: skip
        notes = [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        if any(row.alike for row in self.rows):
            notes.append("alike: with the same numbers of heads in all layers like it")
        notes += [f"not reached by the inputs: {path}" for path in self.not_run]
        lines = [f"{self._cache()}: {self.bytes_per_token:,} bytes per token in all layers"]
        if self.kinds:
            lines.append(f"kinds to swap in: {', '.join(self.kinds)}")
        if self.key_value_heads:
            lines.append(f"key/value heads to convert to: {', '.join(map(str, self.key_value_heads))}")
        parts = [f"{self.model}, {self.dtype}", text_table([(*header, *changes), *table])]
        return "\n\n".join([*parts, *(["\n".join(notes)] if notes else []), "\n".join(lines)])

    def _cache(self) -> str:
        if any(row.is_causal for row in self.rows):
            return "cache"
        known_all = all(row.calls_interface for row in self.rows)
        return "keys and values (no cache: an encoder)" if known_all else "keys and values"


def describe_attention(model: PreTrainedModel, *, probe: Mapping[str, Any] | None = None) -> AttentionReport:
    """Say for each attention of a model what it is and what can be done with it.

    The model is run on a few tokens (an image, features), and each change is tried on a twin that shares its weights.
    The model is as it was afterwards. It costs about as much as making one change of each sort to one layer of each
    sort, and no copy of the weights.

    Args:
        probe: inputs for `model(**probe)`; by default those of `set_probe`, else made from what its forward takes.

    Returns:
        A report, which prints as a table with the reasons below it.

    Raises:
        TypeError: if `model` is no `PreTrainedModel`.
        ValueError: for a model without attention, without weights, quantized, or that differs from run to run; for
            inputs that cannot be made, or under which the model does not run.
    """
    with searched_once():
        return _described(model, probe)


def _described(model: PreTrainedModel, probe: Mapping[str, Any] | None) -> AttentionReport:
    with known.transformers_attention(model):
        known.require_runnable(model)
        found = discover(model, known.probe_of(model) if probe is None and _is_model(model) else probe)
    trials = Trials(model, found, None if probe is None else found.inputs)
    with known.transformers_attention(model):
        rotary = _rotary(model, found)
    base = bases(model)
    rows = []
    empty = without_heads(model, found.attentions)
    for attention in found.attentions:
        outcome = trials.of(attention)
        pairing, rotated = rotary[signature(attention)]
        num_heads = 0 if attention.index in empty else attention.num_heads
        rows.append(AttentionRow(
            attention.path, attention.calls_interface, num_heads, trials.key_value_heads[attention.index],
            attention.head_dim, attention.value_head_dim,
            attention.is_causal, attention.is_cross, attention.window, pairing, rotated, _runs(model, attention, base),
            swap=outcome["swap"], score=trials.score or _opaque(attention), prune=outcome["prune"],
            convert=outcome["convert"], alike=trials.alike(attention),
        ))  # fmt: skip
    numbers = zip(found.attentions, rows, strict=True)
    size = sum(bytes_of_attention(each, _counted(row), model.dtype) for each, row in numbers)
    return AttentionReport(
        type(model).__name__, str(model.dtype).removeprefix("torch."), tuple(rows), trials.kinds(), _targets(rows),
        size, found.not_run,
    )  # fmt: skip


def cache_bytes(rows: Sequence[AttentionRow], dtype: torch.dtype) -> int:
    """Bytes of keys and values per token, of a model that runs what it was made with."""
    return sum(_counted(row) * (row.head_dim + row.value_head_dim) for row in rows) * dtype.itemsize


def _counted(row: AttentionRow) -> int:
    """Heads whose keys and values are computed; where none is left, its stand-in."""
    return max(1, row.num_key_value_heads)


def _opaque(attention: Attention) -> str:
    """Why its heads get no score where others of the model do, or nothing."""
    if attention.calls_interface or attention.output is not None:
        return ""
    return "its heads can neither be looked at nor told (nn.MultiheadAttention or the like), so their scores are NaN"


def _is_model(model: Any) -> bool:
    return isinstance(model, PreTrainedModel)


def _rotary(model: PreTrainedModel, found: Discovery) -> dict[Any, tuple[str, int]]:
    """By signature, how keys are rotated, and how many of their components; ("", 0) where that cannot be told."""
    rotary: dict[Any, tuple[str, int]] = {}
    for attention in found.attentions:
        key = signature(attention)
        if key in rotary:
            continue
        try:
            pairs = rotary_pairs(model, attention, ownerships(model, [attention])[0])
        except ValueError:  # it does not run alone
            pairs = None
        rotary[key] = ("", 0) if pairs is None else (pairs.pairing, 2 * len(pairs.pairs))
    return rotary


def _targets(rows: Sequence[AttentionRow]) -> tuple[int, ...]:
    if any(row.convert for row in rows):
        return ()
    numbers = [row.num_key_value_heads for row in rows]
    return tuple(n for n in range(max(numbers) - 1, 0, -1) if all(number % n == 0 for number in numbers))


def _runs(model: PreTrainedModel, attention: Attention, base: Mapping[int, str]) -> str:
    if not attention.calls_interface:
        return "its own"
    kind = getattr(attention.module, ATTRIBUTE, None)
    if isinstance(kind, Kind):
        options = (f"{field.name}={getattr(kind, field.name)}" for field in fields(kind))
        return " ".join([kind.name, *options])
    config = getattr(attention.module, "config", None)
    return base.get(id(config), base[id(model.config)])


def _sees(row: AttentionRow) -> str:
    if not row.calls_interface:
        return "?"
    seen = "other sequence" if row.is_cross else "past" if row.is_causal else "all"
    return seen if row.window is None else f"{seen}, {row.window}"


def _size(row: AttentionRow) -> str:
    return f"{row.head_dim}" if row.head_dim == row.value_head_dim else f"{row.head_dim}, {row.value_head_dim}"
