"""The promise after every error: the model is exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Config, the modules' own attributes (modes, numbers of heads, hooks, markers) and parameter objects."""
    private = {"_parameters", "_buffers", "_modules"}
    modules = {
        name: {
            key: value if callable(value) else copy.copy(value)
            for key, value in module.__dict__.items()
            if key not in private and not isinstance(value, torch.Tensor)
        }
        for name, module in model.named_modules()
    }
    return {
        "config": model.config.to_json_string(use_diff=False),
        "config state": copy.deepcopy(model.config.__dict__),
        "states of the parts' configs": {
            name: copy.deepcopy(part.config.__dict__)
            for name, part in model.named_modules()
            if isinstance(part, PreTrainedModel)
        },
        "config objects": {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")},
        "modules": {
            name: {k: v for k, v in attributes.items() if k != "config"} for name, attributes in modules.items()
        },
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "gradients wanted": {name: p.requires_grad for name, p in model.named_parameters()},
    }


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Fails if the block changed anything of the model: weights bit by bit, parameter objects, config, attributes."""
    before = snapshot(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    after = snapshot(model)
    for part in before:
        assert after[part] == before[part], part
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        same = state[name].is_meta if tensor.is_meta else torch.equal(state[name], tensor)
        assert same, name
