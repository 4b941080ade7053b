"""Say in Transformers' own config fields what was cut, where its class then builds the very same model.

Where all layers of a config were cut to the same numbers, `num_attention_heads`, `num_key_value_heads` and `head_dim`
may say it. That is tried: the stock class is built from them, takes over the model's weights, and must put out the
same, bit for bit. Then the checkpoint is a plain one that needs no package but Transformers; what is left of
the record is its version.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.kind import NAME
from hf_attnkit.editing.cut_heads import CutHeads
from hf_attnkit.editing.head_record import KEY, VERSION, record_of
from hf_attnkit.models.discovery import Discovery, quiet, run_outputs
from hf_attnkit.models.tensors import first_difference
from hf_attnkit.models.whole import configs_in

Fields = dict[str, int]


def into_stock_fields(
    model: PreTrainedModel, found: Discovery, cut: CutHeads, heads: Sequence[tuple[int, int]]
) -> bool:
    """Write the numbers into the config's own fields in place of the record, where that is proven to be the same.

    Args:
        found: the discovery before the cut.
        heads: of each attention now: query and key/value heads; (0, 0) for a stand-in.

    Returns:
        Whether the model is plain now.
    """
    if (0, 0) in heads:  # no field of Transformers' says that a head is a stand-in
        return False
    fields = _uniform_fields(model, found, heads)
    if not fields or not _says_more(model, fields, cut):
        return False
    if any(key in (getattr(model.config, KEY, None) or {}) for key in ("layers", "base")):
        return False
    if not _same_model(model, fields, found.inputs, cut.outputs):
        return False
    for old in list(configs_in(model.config)):
        for name, value in fields.get(id(old), {}).items():
            cut.steps.set(old, name, value)
        if KEY in old.__dict__:
            cut.steps.set(old, KEY, {"version": VERSION, "heads": {}})
        if old.__dict__.get("attn_implementation") == NAME:
            cut.steps.drop(old, "attn_implementation")
    return True


def _says_more(model: PreTrainedModel, fields: Mapping[int, Fields], cut: CutHeads) -> bool:
    """Whether a field says another number than the class would build the uncut model by."""
    configs = list(configs_in(model.config))
    changed = any(
        getattr(each, name, None) != value for each in configs for name, value in fields.get(id(each), {}).items()
    )
    return changed or bool(cut.config) or any(record_of(each).get("config") for each in configs)


def _forget(config: PreTrainedConfig) -> None:
    config.__dict__.pop(KEY, None)
    if config.__dict__.get("attn_implementation") == NAME:
        del config.attn_implementation


def _uniform_fields(
    model: PreTrainedModel, found: Discovery, heads: Sequence[tuple[int, int]]
) -> dict[int, Fields] | None:
    """For each config with a record, fields with its numbers, if all attentions of its model have the same."""
    saved = {id(config): config for config in configs_in(model.config)}
    recorded = {key for key, config in saved.items() if record_of(config)}
    by_config: dict[int, set[tuple[int, int, int]]] = {}
    for attention, numbers in zip(found.attentions, heads, strict=True):
        config = _config_of(model, attention.path)
        by_config.setdefault(id(config), set()).add((*numbers, attention.head_dim))
    fields: dict[int, Fields] = {}
    for key in recorded:
        if len(by_config.get(key, ())) != 1:
            return None
        config = saved[key]
        ((num_heads, groups, head_dim),) = by_config[key]
        values = {"num_attention_heads": num_heads, "num_key_value_heads": groups, "head_dim": head_dim}
        fields[key] = {name: value for name, value in values.items() if getattr(config, name, None) is not None}
        # Some classes (Phi-3) read it, though their config does not have it.
        if getattr(config, "head_dim", None) is None and (
            hasattr(config, "head_dim") or num_heads * head_dim != getattr(config, "hidden_size", num_heads * head_dim)
        ):
            fields[key]["head_dim"] = head_dim
    return fields


def _config_of(model: PreTrainedModel, path: str) -> PreTrainedConfig:
    """The config of the innermost model that a module is in."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        owner = model.get_submodule(".".join(parts[:end]))
        if isinstance(owner, PreTrainedModel):
            return owner.config
    return model.config


def _same_model(
    model: PreTrainedModel, fields: Mapping[int, Fields], inputs: Mapping[str, Any], outputs: Sequence[Tensor]
) -> bool:
    """Whether the model's class, built from its config with these fields, is the same model.

    Args:
        outputs: of the model under these inputs.
    """
    config = copy.deepcopy(model.config)
    try:
        for old, new in zip(configs_in(model.config), list(configs_in(config)), strict=True):
            _forget(new)
            for name, value in fields.get(id(old), {}).items():
                setattr(new, name, value)
        config = type(config).from_dict(config.to_dict())
        config._attn_implementation = model.config._attn_implementation
        with torch.device("meta"):
            stock = type(model)(config)
        ours, theirs = _tensors(model), _tensors(stock)
        if {n: tuple(t.shape) for n, t in ours.items()} != {n: tuple(t.shape) for n, t in theirs.items()}:
            return False
        for name, tensor in ours.items():
            path, _, leaf = name.rpartition(".")
            owner = stock.get_submodule(path)
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor
        stock.eval()
        with quiet(model):
            return first_difference(outputs, run_outputs(stock, inputs)) is None
    except Exception:  # whatever a class says that is built from such numbers, it is not the same model
        return False


def _tensors(model: nn.Module) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
