"""Models whose heads are known from the table of families: which they are, and the proof that theirs were removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.attention.kind import PARAMETERS
from hf_attnkit.editing.proof import Zeroed
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import running_inputs
from hf_attnkit.models.layers import AttentionLayer, attention_layers, in_table


def cut_by_table(model: PreTrainedModel) -> bool:
    """Whether the table of families knows all that belongs to the model's heads."""
    if not isinstance(model, PreTrainedModel):
        return True  # which refuses it
    return in_table(model) and not any(norms_per_head(layer) for layer in attention_layers(model, adapters=True))


def norms_per_head(layer: AttentionLayer) -> list[str]:
    """Parameters of the attention module next to its projections that are not one for all heads."""
    projections = {id(m) for part in (layer.query, layer.key, layer.value, layer.output) for m in part.modules()}
    found = []
    for path, module in layer.module.named_modules():
        if id(module) in projections or path.startswith(PARAMETERS):  # what a swap brought is no part of the model
            continue
        in_list = any(part.isdecimal() for part in path.split("."))
        for name, parameter in module.named_parameters(recurse=False):
            if in_list or tuple(parameter.shape) != (layer.head_dim,):
                found.append(f"{path}.{name}".lstrip("."))
    return found


def by_number(
    model: nn.Module, heads: Mapping[Any, Iterable[int]], layers: Sequence[AttentionLayer]
) -> Mapping[int, Iterable[int]]:
    """The same, layers that are named by the path of their module by number."""
    if not isinstance(heads, Mapping) or not any(isinstance(key, str) for key in heads):
        return heads
    modules = {id(layer.module): layer.index for layer in layers}
    paths = {path: modules[id(module)] for path, module in model.named_modules() if id(module) in modules}
    if unknown := [key for key in heads if isinstance(key, str) and key not in paths]:
        raise ValueError(f"no attention has the path {unknown[0]!r}; there are {', '.join(paths)}")
    found: dict[int, Iterable[int]] = {}
    for key, given in heads.items():
        index = paths[key] if isinstance(key, str) else key
        if index in found:
            raise ValueError(f"layer {index} is named twice, by number and by path")
        found[index] = given
    return found


def proof_of_removal(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    removed: Mapping[int, Iterable[int]],
    probe: Mapping[str, Any] | None = None,
) -> Zeroed:
    """What the model puts out with these heads' outputs zeroed."""
    attentions = [
        Attention(
            layer.index, layer.name, layer.module, layer.num_heads, layer.num_key_value_heads, layer.head_dim,
            layer.head_dim,
        )
        for layer in layers
    ]  # fmt: skip
    gone = {index: sorted(heads) for index, heads in removed.items()}
    return Zeroed(model, attentions, gone, running_inputs(model, probe), {})
