"""The whole that a part of a model is in: what is saved says what was changed, and a part does not know its whole.

Some parts have a config of their own inside the whole's (CLIP's towers, LLaVA's language model): they can say by
themselves what was changed in them. Others share the whole's config (BART's encoder), so that what it says would hold
for the rest too, or have a copy that is never saved (T5's encoder): there the whole has to say it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Enclosing = list[tuple[str, PreTrainedModel]]
# By model, what `enclosing` found while `searched_once` runs.
_searched: ContextVar[WeakKeyDictionary[PreTrainedModel, Enclosing] | None] = ContextVar("_searched", default=None)


@contextmanager
def searched_once() -> Iterator[None]:
    """For the steps of one change: each search for what a model is in walks through all objects that there are."""
    if _searched.get() is not None:
        yield
        return
    token = _searched.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _searched.reset(token)


def configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it, which are saved with it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig) and value is not config:
            yield from configs_in(value)


def enclosing(model: PreTrainedModel) -> Enclosing:
    """The models that this one is inside of, the largest first, with its path in each.

    All models that there are get looked at: PyTorch's modules do not know what they are in.
    """
    searched = _searched.get()
    if searched is None:
        return _search(model)
    if model not in searched:
        searched[model] = _search(model)
    return searched[model]


def _search(model: PreTrainedModel) -> Enclosing:
    if not any(map(_holds_parts, gc.get_referrers(model))):  # there is no whole to look for
        return []
    found = []
    for each in gc.get_objects():
        if issubclass(type(each), PreTrainedModel) and each is not model and "_modules" in vars(each):
            path = next((name for name, part in each.named_modules() if part is model), None)
            if path is not None:
                found.append((path, each))
    return sorted(found, key=lambda pair: pair[0].count("."), reverse=True)


def _holds_parts(holder: object) -> bool:
    """Whether it can be a module's table of parts."""
    return type(holder) is dict and all(part is None or isinstance(part, nn.Module) for part in holder.values())


def saved_with(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The model that has to say what is changed in this one, and the path in it; itself, with no path, where it can."""
    if not isinstance(model, PreTrainedModel):
        return "", model  # which whatever is done next refuses
    own = {id(module) for module in model.modules()}
    for path, whole in enclosing(model):
        is_copy = all(config is not model.config for config in configs_in(whole.config))
        if is_copy or any(_takes(part, model.config) for part in whole.modules() if id(part) not in own):
            return path, whole
    return "", model


def _takes(module: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a module that is no model, such as one that attends, runs by this config."""
    return not isinstance(module, PreTrainedModel) and getattr(module, "config", None) is config
