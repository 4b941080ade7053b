"""How a model rotates its queries and keys, found among its frequencies and proved by moving its tokens.

The model runs, with Transformers' own attention, on a few tokens at positions 0, 1, 2 ... and again at the same plus d,
once with d beyond the length that it was trained for. The second run continues with the first run's output of each
attention, so that hidden states are the same and queries differ by their rotation alone: moved back by d they must be
those of the first run, up to the rounding of angles and products. Positions that are learned, a layer without any,
frequencies that depend on the length and pairs that are not known fail that.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.kernels.rotation import Rotation
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.known import known, transformers_attention
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.models.tensors import cloned

OF_LENGTH = ("dynamic", "longrope")  # Transformers' scalings whose frequencies change with the length
SHIFT = 7


def find_rotations(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> dict[int, Rotation]:
    """By their index, how these layers rotate queries and keys.

    Raises:
        ValueError: for a layer of which that cannot be proved.
    """
    if not layers:
        return {}
    inputs = dict(known(model).discovery.inputs)
    ids = inputs.get("input_ids")
    if ids is None or "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(_refusal(layers[0], f"{type(model).__name__} takes no position_ids that could move"))
    candidates = _candidates(model, layers[0])
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    shifts = [SHIFT, trained + SHIFT]
    with quiet(model), transformers_attention(model):
        first = _queries(model, layers, inputs | {"position_ids": at})
        moved = [_queries(model, layers, inputs | {"position_ids": at + shift}, first) for shift in shifts]
    found = {}
    for layer in layers:
        queries = [runs[id(layer.module)] for runs in moved]
        where = first[id(layer.module)][0]
        fitting = [each for each in candidates if _fits(each, where, [query for query, _ in queries], shifts)]
        if not fitting:
            why = "its queries do not move with their positions as a rotary embedding of fixed frequencies has it"
            raise ValueError(_refusal(layer, why))
        found[layer.index] = fitting[0]
    return found


def _refusal(layer: AttentionLayer, why: str) -> str:
    return (
        f"{layer.name}: renumber=True counts positions within the cache, for which keys are rotated again, and {why}; "
        "use renumber=False, or name other layers with layers=[...]"
    )


def _candidates(model: nn.Module, layer: AttentionLayer) -> list[Rotation]:
    """Each set of frequencies in the model, with pairs of both sorts."""
    found: list[Tensor] = []
    for module in model.modules():
        named = {name: each for name, each in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
        kinds = getattr(module, "rope_type", "")
        if named and any(kind in OF_LENGTH for kind in (kinds.values() if isinstance(kinds, Mapping) else [kinds])):
            why = f"its frequencies depend on the length ({kinds!r} scaling)"
            raise ValueError(_refusal(layer, why))
        for name, buffer in named.items():
            if not name.endswith("original_inv_freq") and not any(torch.equal(buffer, other) for other in found):
                found.append(buffer.detach().clone())
    if not found:
        raise ValueError(_refusal(layer, f"{type(model).__name__} has no rotary position embedding"))
    return [Rotation(frequencies, interleaved) for frequencies in found for interleaved in (False, True)]


def _queries(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    inputs: Mapping[str, Any],
    before: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """By module, queries as they arrive and the output of the call, which is that of `before` where it is given."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(call: Call) -> tuple[Tensor, Any]:
        output, weights = (before[id(call.module)][1], None) if before is not None else call.run()
        seen[id(call.module)] = (call.query, output)
        return output, weights

    with watched([layer.module for layer in layers], note):
        model(**cloned(dict(inputs)))
    return seen


def _fits(rotation: Rotation, query: Tensor, moved: Sequence[Tensor], shifts: Sequence[int]) -> bool:
    if 2 * rotation.frequencies.shape[0] > query.shape[-1]:
        return False
    size = float(query.double().abs().max())
    for states, shift in zip(moved, shifts, strict=True):
        by = torch.full((1, query.shape[2]), shift, device=query.device)
        off = float((rotation.back(states.double(), by) - query.double()).abs().max())
        # Products round in the model's dtype, angles in float32.
        angles = torch.finfo(torch.float32).eps * (shift + query.shape[2]) * float(rotation.frequencies.abs().max())
        if not off <= (8 * torch.finfo(query.dtype).eps + 2 * angles) * 2 * size:
            return False
    return size > 0 and all(not torch.equal(states, query) for states in moved)
