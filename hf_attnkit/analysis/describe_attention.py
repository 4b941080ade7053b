"""`describe_attention`: what a model's attention is, and what can be done with it; where not, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships, signature
from hf_attnkit.models.rotary_pairs import rotary_pairs


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
        swap: another attention in its place.
        score: of its heads, by every method.
        prune: heads removed.
        convert: key/value heads merged.
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
    swap: str
    score: str
    prune: str
    convert: str


@dataclass(frozen=True)
class AttentionReport:
    """What `describe_attention` found; `print` it for a table.

    Attributes:
        model: the model's class.
        rows: one for each attention, in calling order.
        not_run: paths of models inside that the inputs did not reach, of which nothing is known.
    """

    model: str
    rows: tuple[AttentionRow, ...]
    not_run: tuple[str, ...]

    def __str__(self) -> str:
        reasons: list[str] = []

        def mark(reason: str) -> str:
            if not reason:
                return "yes"
            if reason not in reasons:
                reasons.append(reason)
            return f"[{reasons.index(reason) + 1}]"

        head = (
            "attention",
            "heads",
            "key/value",
            "size",
            "sees",
            "window",
            "rotary",
            "swap",
            "score",
            "prune",
            "convert",
        )
        table: list[tuple[str, ...]] = [head]
        for row in self.rows:
            size = f"{row.head_dim}" if row.head_dim == row.value_head_dim else f"{row.head_dim}, {row.value_head_dim}"
            table.append((
                row.path, str(row.num_heads), str(row.num_key_value_heads), size,
                _sees(row),
                "" if row.window is None else str(row.window),
                f"{row.rotary} {row.rotated}/{row.head_dim}" if row.rotary else "",
                *map(mark, (row.swap, row.score, row.prune, row.convert)),
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines += [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        lines += [f"not reached by the inputs: {path}" for path in self.not_run]
        return "\n".join(lines)


def describe_attention(model: PreTrainedModel, *, probe: Mapping[str, Any] | None = None) -> AttentionReport:
    """Say for each attention of a model what it is and what can be done with it.

    The model is run on a few tokens (an image, features) and is as it was afterwards.

    Args:
        probe: inputs for `model(**probe)`; by default made from what its forward takes.

    Raises:
        TypeError: if `model` is no `PreTrainedModel`.
        ValueError: for a model without attention, without weights, quantized, or that differs from run to run; for
            inputs that cannot be made.
    """
    found = discover(model, probe)
    owned = ownerships(model, found.attentions)
    rotary: dict[Any, tuple[str, int]] = {}
    rows = []
    for attention, own in zip(found.attentions, owned, strict=True):
        key = signature(attention)
        if key not in rotary:
            pairs = rotary_pairs(model, attention, own)
            rotary[key] = ("", 0) if pairs is None else (pairs.pairing, 2 * len(pairs.pairs))
        pairing, rotated = rotary[key]
        rows.append(AttentionRow(
            attention.path, attention.calls_interface, attention.num_heads, own.num_key_value_heads,
            attention.head_dim, attention.value_head_dim,
            attention.is_causal, attention.is_cross, attention.window, pairing, rotated,
            swap=_swap(attention), score=_score(attention, own), prune=_prune(attention, own),
            convert=_convert(attention, own),
        ))  # fmt: skip
    return AttentionReport(type(model).__name__, tuple(rows), found.not_run)


def _sees(row: AttentionRow) -> str:
    if not row.calls_interface:
        return "?"
    return "other sequence" if row.is_cross else "past" if row.is_causal else "all"


def _swap(attention: Attention) -> str:
    if not attention.calls_interface:
        return attention.reason
    return ""


def _score(attention: Attention, own: Ownership) -> str:
    if own.output is None:
        return "no output projection takes its heads"
    if not attention.calls_interface:
        return f"not by entropy: {attention.reason}"
    return ""


def _prune(attention: Attention, own: Ownership) -> str:
    if attention.calls_per_forward > 1:
        return "it attends several times in one forward pass"
    return own.problem


def _convert(attention: Attention, own: Ownership) -> str:
    if not attention.calls_interface:
        return attention.reason
    if problem := _prune(attention, own):
        return problem
    if own.num_key_value_heads == 1:
        return "it has one key/value head"
    rows = {role: own.rows_per_head(role) for role in ("key", "value")}
    if rows != {"key": attention.head_dim, "value": attention.value_head_dim}:
        return f"a head's keys and values are made by more than their own rows (latent attention): {rows}"
    return ""
