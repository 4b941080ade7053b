"""Look at what a swapped model is called with, before its forward: a pre-hook on the model and its parts.

A layer sees only those keyword arguments that the model hands down, and many models drop some. What changes the
result, and would do nothing, is refused here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from hf_attnkit.attention.kind import ATTRIBUTE, Kind, Stock
from hf_attnkit.attention.packing import starts
from hf_attnkit.attention.table import KINDS

# On a module whose attention reads some of them: those that the model hands down to it.
HANDED_DOWN = "_hf_attnkit_handed_down"


def add_checks(model: PreTrainedModel) -> None:
    """From now on calls of the model, and of its parts that are models, are looked at."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and check_call not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(check_call, with_kwargs=True)


def remove_checks(model: PreTrainedModel) -> None:
    """Undo `add_checks`."""
    for part in model.modules():
        for number, hook in list(part._forward_pre_hooks.items()):
            if hook is check_call:
                del part._forward_pre_hooks[number]
                part._forward_pre_hooks_with_kwargs.pop(number, None)


def check_call(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refuse what would do nothing, and keep the documents of packed rows apart.

    Raises:
        ValueError: for `output_attentions` with a layer that forms no weights, a keyword that no layer's attention
            reads, and packed rows with a cache or an attention mask.
    """
    given = dict(zip(_arguments(type(model).forward), args, strict=False)) | kwargs if args else kwargs
    wanted = given.get("output_attentions")
    if getattr(model.config, "output_attentions", False) if wanted is None else wanted:
        _require_weights(model)
    for name in _call_arguments():
        if given.get(name) is not None:
            _require_reader(model, name)
    positions = given.get("position_ids")
    if positions is None:
        return _as_one_text(model, args, kwargs, given)
    # A compiled graph cannot look at values, nor does Transformers look for documents there.
    if is_tracing(positions) or starts(positions) is None or not _is_decoder(model):
        return None
    return _apart(model, args, kwargs, given)


def note_handed_down(model: PreTrainedModel, modules: list[nn.Module], inputs: Mapping[str, Any]) -> None:
    """Try out which call arguments reach these modules' attention, and note it on those that read them.

    Args:
        inputs: small ones, under which the model runs, or its `base_model`.
    """
    for name in _call_arguments():
        readers = [module for module in modules if name in getattr(module, ATTRIBUTE).call_arguments]
        arrives = bool(readers) and any(_arrives(part, readers, name, inputs) for part in (model, model.base_model))
        for module in readers:
            noted = module.__dict__.get(HANDED_DOWN, frozenset())
            module.__dict__[HANDED_DOWN] = noted | {name} if arrives else noted - {name}


class _Reached(Exception):
    """A reader is about to attend; the rest of the forward pass is not needed."""


def _arrives(model: PreTrainedModel, readers: list[nn.Module], name: str, inputs: Mapping[str, Any]) -> bool:
    found = False

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal found
        found = kwargs.get(name) is not None
        raise _Reached

    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    with ExitStack() as stack:
        for module in readers:
            stack.callback(module.register_forward_pre_hook(look, with_kwargs=True, prepend=True).remove)
        # A head that needs other inputs, and a forward that refuses the argument, do not take it either.
        with suppress(_Reached, Exception):
            model(**inputs, **{name: torch.ones(first.shape[:2], dtype=torch.long, device=first.device)})
    return found


def _call_arguments() -> list[str]:
    return list(dict.fromkeys(name for kind in KINDS.values() for name in kind.call_arguments))


def _kinds(model: nn.Module) -> list[tuple[nn.Module, Kind | Stock]]:
    return [(part, part.__dict__[ATTRIBUTE]) for part in model.modules() if ATTRIBUTE in part.__dict__]


def _require_weights(model: PreTrainedModel) -> None:
    for _, kind in _kinds(model):
        if not kind.returns_weights:
            # Transformers would leave this layer out of the tuple, and the others would take its place.
            raise ValueError(f"attention {kind.name!r} forms no attention weights; for output_attentions swap to 'mha'")


def _require_reader(model: PreTrainedModel, name: str) -> None:
    kinds = _kinds(model)
    readers = [part for part, kind in kinds if name in kind.call_arguments]
    if kinds and not readers:
        names = ", ".join(sorted({repr(kind.name) for _, kind in kinds}))
        raise ValueError(f"{name} was given, and no layer reads it: they run {names}; leave it out")
    for part in readers:
        if name not in part.__dict__.get(HANDED_DOWN, ()):
            raise ValueError(
                f"{name} was given, but {type(model).__name__} does not hand it down to {type(part).__name__}, so it "
                "would do nothing; leave it out, and choose tokens by an option of swap_attention"
            )


def _is_decoder(model: PreTrainedModel) -> bool:
    """Whether Transformers looks for packed rows in this model: all of its attention is causal, over one sequence."""
    kinds = _kinds(model)
    return bool(kinds) and all(getattr(part, "is_causal", False) for part, _ in kinds)


def _apart(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The call under which Transformers keeps documents apart: without a cache, which nobody asked for."""
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return None  # a matrix says itself what is apart
    if starts(given["position_ids"], mask) is None:
        return None  # positions of padding
    obstacle = "an attention_mask" if mask is not None else "a cache" if _asks_for_cache(given) else None
    if obstacle:
        raise ValueError(
            f"position_ids restart within a row, so it holds several documents, and with {obstacle} they would attend "
            "to each other; for packed rows give neither an attention_mask nor a cache, and use_cache=False"
        )
    return (args, kwargs | {"use_cache": False}) if "use_cache" in _arguments(type(model).forward) else None


def _as_one_text(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """In a compiled graph, the call with a mask that hides nothing.

    There Transformers makes a matrix of packed rows of any positions that it cannot look at, also of those that the
    model counts itself, unless there is a mask or a cache. Linear attention takes no matrix, and it would make windows
    cost the square of the length: 15 times the seconds at 4,096 tokens.
    """
    tokens = next((each for name in ("input_ids", "inputs_embeds") if (each := given.get(name)) is not None), None)
    if not isinstance(tokens, Tensor) or not is_tracing(tokens):
        return None
    if given.get("attention_mask") is not None or _makes_cache(model, given):
        return None
    is_ours = any(isinstance(kind, Kind) for _, kind in _kinds(model))
    if not is_ours or "attention_mask" not in _arguments(type(model).forward) or not _is_decoder(model):
        return None
    return args, kwargs | {"attention_mask": tokens.new_ones(tokens.shape[:2], dtype=torch.long)}


def _makes_cache(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    if given.get("use_cache") is None and getattr(model.config.get_text_config(decoder=True), "use_cache", False):
        return not (model.training and model.is_gradient_checkpointing)
    return _asks_for_cache(given)


def _asks_for_cache(given: dict[str, Any]) -> bool:
    return any(isinstance(value, Cache) for value in given.values()) or bool(given.get("use_cache"))


@functools.cache
def _arguments(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
