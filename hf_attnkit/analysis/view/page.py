"""The page: numbers as JSON and packed bytes inside of one file; what draws them is in `templates`.

A weight p is one byte: 0 where no query sees the key, else 1 + round(254 sqrt(p)). The square root gives small weights
more of the 254 steps: a weight is off by at most sqrt(p) / 254 + 1 / 254^2 / 4. All bytes are packed by zlib, which a
browser unpacks by itself (`DecompressionStream`). Everything that comes from outside is JSON, where `<` is written as
an escape, and becomes text by `textContent`: nothing of it is ever markup.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_attnkit.analysis.view.difference import Difference
from hf_attnkit.analysis.view.flow import attention_flow
from hf_attnkit.analysis.view.maps import AttentionMap, Example
from hf_attnkit.analysis.view.rollout import rollout

STEPS = 254
SCRIPTS = ("numbers.js", "widgets.js", "views.js", "main.js")  # in this order
FLOW_WORK = 2e6  # about three seconds of NetworkX


class Bytes:
    """Arrays one after the other, each at a multiple of four."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, array: NDArray[Any]) -> int:
        """Where it begins."""
        content = np.ascontiguousarray(array).tobytes()
        content += b"\0" * (-len(content) % 4)
        self._parts.append(content)
        self._length += len(content)
        return self._length - len(content)

    def packed(self) -> str:
        """All of it, zlib and base64."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), 6)).decode("ascii")


def quantized(p: Tensor, visible: Tensor | None = None) -> NDArray[np.uint8]:
    """One byte for each weight, see above."""
    steps = (p.clamp(0, 1).sqrt() * STEPS).round().to(torch.uint8) + 1
    return np.asarray((steps if visible is None else steps * visible).numpy())


def make_page(
    title: str,
    names: Sequence[str],
    examples: Sequence[Example],
    compared: Sequence[Example] = (),
    differences: Sequence[Sequence[Difference]] = (),
    importance: Tensor | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page; arguments as the attributes of `AttentionView`."""
    packed = Bytes()
    shown = []
    for number, example in enumerate(examples):
        found: dict[str, Any] = {
            "sequences": [_sequence(each, packed) for each in example.sequences],
            "maps": [[_map(each, packed) for each in example.maps]],
            "attributions": _attributions(example, packed),
        }
        if compared:
            found["maps"].append([_map(each, packed) for each in compared[number].maps])
            found["differences"] = [_difference(each, packed) for each in differences[number]]
        shown.append(found)
    data = {
        "title": title,
        "names": list(names),
        "examples": shown,
        "importance": None if importance is None else [[_number(x) for x in row] for row in importance.tolist()],
        "notes": list(notes),
    }
    return _filled({
        "TITLE": _escaped(title), "STYLE": _template("view.css"), "SCRIPT": "\n".join(map(_template, SCRIPTS)),
        "DATA": _json(data),
        "BYTES": packed.packed(),
    })  # fmt: skip


def _filled(values: dict[str, str]) -> str:
    """The template with each `@NAME@` replaced, once: what is put in is not looked at again."""
    parts = _template("view.html").split("@")
    return "".join(values[part] if number % 2 else part for number, part in enumerate(parts))


def _template(name: str) -> str:
    return (files("hf_attnkit.analysis.view") / "templates" / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _json(data: Any) -> str:
    """JSON that can be inside of a script element."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _numbers(values: Tensor | None) -> list[float | None]:
    return [] if values is None else [_number(value) for value in values.tolist()]


def _sequence(sequence: Any, packed: Bytes) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": sequence.name, "labels": list(sequence.labels), "is_text": sequence.is_text, "block": sequence.block,
        "units": sequence.units,
    }  # fmt: skip
    if sequence.grid is not None and sequence.pixels is not None:
        height, width, _ = sequence.pixels.shape
        found["grid"] = {
            "rows": sequence.grid.rows, "columns": sequence.grid.columns, "first": sequence.grid.first,
            "height": height, "width": width, "at": packed.add(sequence.pixels.numpy()),
        }  # fmt: skip
    return found


def _map(found: AttentionMap, packed: Bytes) -> dict[str, Any]:
    made: dict[str, Any] = {
        "layer": found.layer, "name": found.name, "kind": found.kind, "queries": found.queries, "keys": found.keys,
        "cross": found.is_cross, "groups": found.num_key_value_heads, "streaming": list(found.streaming),
        "missing": found.missing, "heads": found.num_heads,
    }  # fmt: skip
    if found.weights is None or found.visible is None:
        return made
    made |= {
        "rows": found.weights.shape[1], "columns": found.weights.shape[2],
        "at": packed.add(quantized(found.weights, found.visible)),
        "entropy": _numbers(found.entropy), "distance": _numbers(found.distance),
        "confidence": _numbers(found.confidence),
    }  # fmt: skip
    if found.sink is not None:
        made["sink"] = packed.add(quantized(found.sink))
    if found.links is not None:
        made["links"] = {
            "stride": found.links.stride, "queries": found.links.keys.shape[1], "of_each": found.links.keys.shape[2],
            "keys": packed.add(found.links.keys.numpy().astype("<i4")),
            "weights": packed.add(quantized(found.links.weights)),
        }  # fmt: skip
    return made


def _difference(found: Difference, packed: Bytes) -> dict[str, Any]:
    rows = torch.nan_to_num(found.by_query)
    return {
        "matched": list(found.matched), "total": _numbers(found.total),
        "rows": packed.add(quantized(rows)),
    }  # fmt: skip


def _attributions(example: Example, packed: Bytes) -> dict[str, Any]:
    """Rollout of everything, and flow from the token that answers, as far as that takes no longer than a look."""
    rollouts, why = rollout(example)
    made: dict[str, Any] = {
        "rollout": [
            {
                "queries": each.queries, "keys": each.keys, "steps": list(each.steps),
                "rows": each.shares.shape[1], "columns": each.shares.shape[2], "at": packed.add(quantized(each.shares)),
            }
            for each in rollouts
        ],
        "why": why and f"Not shown where it would pass through an attention without weights ({why}).",
        "answers": {each.queries: _answers(example, each.queries) for each in rollouts},
        "flow": [],
        "flow_why": "",
    }  # fmt: skip
    if why:
        return made
    targets = {each.queries for each in example.maps if not each.missing}
    for queries in sorted(targets):
        steps = len({each.name for each in example.maps if each.queries == queries and not each.missing})
        units = max(example.sequences[each.keys].units for each in example.maps if each.queries == queries)
        units = max(units, example.sequences[queries].units)
        every = units**3 * steps**2 / 2 <= FLOW_WORK
        if not every and units**3 * steps > FLOW_WORK:
            made["flow_why"] = (
                f"Attention flow is a maximum flow for each token: too long for {units} units and {steps} layers to be "
                "on each page. AttentionView.attention_flow(token) computes it."
            )
            continue
        made["flow"] += [
            {
                "queries": each.queries, "keys": each.keys, "token": each.token, "steps": list(each.steps),
                "columns": each.flows.shape[1], "at": packed.add(quantized(each.flows)),
            }
            for each in attention_flow(example, queries, _answers(example, queries), every_step=every)
        ]  # fmt: skip
    return made


def _answers(example: Example, queries: int) -> int:
    """The unit that a model answers by: the last where none sees what comes after it, else the first."""
    for each in example.maps:
        if each.queries == each.keys == queries and each.visible is not None:
            return 0 if bool(each.visible.triu(1).any()) else each.visible.shape[1] - 1
    return 0
