"""The shapes of a checkpoint's tensors, by the names that a model gives them, and a model's parameters made so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

Shapes = Mapping[str, tuple[int, ...]]


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


def renamed(shapes: Shapes, model: PreTrainedModel, mapping: Sequence[Any]) -> Shapes:
    """The shapes by the model's names, as `from_pretrained` renames them; tensors that it converts are left out."""
    known = model.state_dict()
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        new, converted = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:
            new, converted = rename_source_key(name, [], [], prefix, known)
        if new in known and converted is None:
            found[new] = shape
    return found


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
        if type(old) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{name} is a {type(old).__name__}, and heads were removed from its module; load the model without "
                "quantization"
            )
        new = old.detach().new_empty(shape)
        if isinstance(old, nn.Parameter):
            owner._parameters[leaf] = nn.Parameter(new, old.requires_grad)
        else:
            owner._buffers[leaf] = new
        if leaf == "weight":
            names = ("nx", "nf") if isinstance(owner, Conv1D) else ("out_features", "in_features")
            for each, size in zip(names, shape, strict=False):
                if type(vars(owner).get(each)) is int:
                    setattr(owner, each, size)
