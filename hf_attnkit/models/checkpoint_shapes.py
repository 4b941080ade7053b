"""The shapes of a checkpoint's tensors, by the names that a model gives them, and a model's parameters made so.

Relied on of Transformers, which promises none of it (so it is in 5.21 to 5.23): `from_pretrained` builds the model on
the meta device and then calls the class's `_load_pretrained_model` once, before any weight is given memory, with the
model, its files (or tensors) and a `load_config` whose `weight_mapping` is how names and tensors are converted; and
`rename_source_key` says by which of these conversions a tensor goes where. `loading_arguments` refuses another form.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

Shapes = Mapping[str, tuple[int, ...]]

# The arguments of `rename_source_key` that are given here.
_RENAMING = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]


def loading_arguments(
    model_class: type[PreTrainedModel], model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Sequence[str] | None, Mapping[str, Tensor] | None, Sequence[Any]]:
    """Files, tensors and conversions that `_load_pretrained_model` of the class is called with.

    Raises:
        RuntimeError: if Transformers loads models in another way.
    """
    renaming = list(inspect.signature(rename_source_key).parameters)[: len(_RENAMING)]
    try:
        given = inspect.signature(model_class._load_pretrained_model).bind(model, *args, **kwargs).arguments
        files, state_dict = given["checkpoint_files"], given["state_dict"]
        mapping = given["load_config"].weight_mapping or []
        if renaming != _RENAMING:
            raise TypeError(f"rename_source_key takes {renaming}")
    except (TypeError, KeyError, AttributeError) as error:
        raise RuntimeError(
            f"transformers {transformers.__version__} loads weights in another way than this hf_attnkit knows "
            f"({type(error).__name__}: {error}), so the shapes of a checkpoint whose heads were changed cannot be "
            "taken from it; install a later hf_attnkit, or a transformers that its requirements allow"
        ) from error
    return files, state_dict, mapping


def stored_shapes(files: Sequence[str | os.PathLike[str]] | None, state_dict: Mapping[str, Tensor] | None) -> Shapes:
    """Shapes by the names in the checkpoint; no tensor is read."""
    if state_dict is not None:
        return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="meta", weights_only=True)
            shapes |= {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    return shapes


def renamed(shapes: Shapes, model: PreTrainedModel, mapping: Sequence[Any], paths: Iterable[str]) -> Shapes:
    """The shapes of what is in these modules, by the model's names: renamed and converted as `from_pretrained` does."""
    known = model.state_dict()
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, inside = model.base_model_prefix, tuple(f"{path}." for path in paths)
    found: dict[str, tuple[int, ...]] = {}
    conversions: dict[str, WeightConverter] = {}
    for name, shape in sorted(shapes.items(), key=lambda item: dot_natural_key(item[0])):
        new, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:
            new, pattern = rename_source_key(name, [], [], prefix, known)
        if new not in known or not new.startswith(inside):
            continue
        if pattern is None:
            found[new] = shape
        else:
            converter = conversions.setdefault(new, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(new, name, pattern, torch.empty(shape, device="meta"))
    for new, converter in conversions.items():
        for target, value in converter.convert(new, model=model, config=model.config).items():
            found[target] = tuple((value[0] if isinstance(value, list) else value).shape)
    return found


def require_reloadable(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Raise `ValueError` where saving and loading would not give the parameters in these modules their shapes back.

    Some models save other tensors than they have (query, key and value as one), and load them by cutting those into
    equal parts.
    """
    inside = tuple(f"{path}." for path in paths)
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(inside)}
    want = {name: tuple(tensor.shape) for name, tensor in state.items()}
    mapping = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
    if not any(isinstance(each, WeightConverter) for each in mapping):
        return
    try:
        saved = revert_weight_conversion(model, {name: tensor.detach().to("meta") for name, tensor in state.items()})
        with torch.device("meta"):  # some conversions ask the model that is loaded for the sizes of its parameters
            empty = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
        got = renamed({name: tuple(tensor.shape) for name, tensor in saved.items()}, empty, mapping, paths)
    except Exception as error:  # whatever conversions say to shapes that they do not know
        raise ValueError(
            f"{type(model).__name__} saves other tensors than it has, and not with these shapes: {str(error)[:200]}"
        ) from error
    if wrong := [name for name, shape in want.items() if got.get(name) != shape]:
        raise ValueError(
            f"{type(model).__name__} saves other tensors than it has, and would load {wrong[0]} with the shape "
            f"{got.get(wrong[0])} and not {want[wrong[0]]}, so that the model could not be loaded again"
        )


def sizes_of(module: nn.Module) -> tuple[str, str]:
    """What the module calls the sizes of its weight."""
    if isinstance(module, nn.Embedding):
        return "num_embeddings", "embedding_dim"
    return ("nx", "nf") if isinstance(module, Conv1D) else ("out_features", "in_features")


def resize(model: nn.Module, paths: Iterable[str], shapes: Shapes) -> None:
    """Make the still empty parameters and buffers in these modules as small as these shapes say.

    Raises:
        ValueError: for a shape that is not the module's, but smaller.
    """
    prefixes = tuple(f"{path}." for path in paths)
    for name, shape in shapes.items():
        if not name.startswith(prefixes):
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
        if tuple(old.shape) == shape:
            continue
        if old.dim() != len(shape) or any(new > size for new, size in zip(shape, old.shape, strict=True)):
            raise ValueError(
                f"{name} has the shape {shape} in the checkpoint and {tuple(old.shape)} in the model, of which heads "
                "were removed; the config is not of these weights"
            )
        is_plain = type(old) in (Tensor, nn.Parameter)
        if not is_plain and not (isinstance(owner, nn.Linear) and old.is_meta):
            raise ValueError(
                f"{name} is a {type(old).__name__}, and heads were removed from its module; load the model without "
                "quantization"
            )
        new = old.detach().new_empty(shape) if is_plain else torch.empty(shape, dtype=old.dtype, device="meta")
        if not is_plain:  # to be quantized (bitsandbytes) when it gets its values: what it knows about how goes along
            owner._parameters[leaf] = type(old)(new, requires_grad=old.requires_grad, **old.__dict__)
        elif isinstance(old, nn.Parameter):
            owner._parameters[leaf] = nn.Parameter(new, old.requires_grad)
        else:
            owner._buffers[leaf] = new
        if leaf == "weight":
            names = sizes_of(owner)
            for each, size in zip(names, shape, strict=False):
                if type(vars(owner).get(each)) is int:
                    setattr(owner, each, size)
