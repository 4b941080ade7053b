"""What discovery found out about a model, kept for as long as it holds.

It holds while the model's parameters are the same objects of the same shapes, on the same devices, and its configs say
the same numbers. A model is looked at under Transformers' own attention, so that what was swapped in does not hide
anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import Discovery, discover, is_spread, require_runnable
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships
from hf_attnkit.models.projected import Projected, projected
from hf_attnkit.models.whole import searched_once

# Of configs: what a model's heads do not depend on.
_OTHER_FIELDS = {"attn_implementation", "_attn_implementation_internal", "_experts_implementation_internal",
                 "hf_attnkit", "problem_type", "use_cache", "output_attentions", "output_hidden_states",
                 "_output_attentions", "return_dict", "name_or_path", "_name_or_path"}  # fmt: skip

__all__ = ["Known", "discovery", "known", "looked_at_once", "owned", "part_configs", "probe_of", "probed",
           "projections", "require_runnable", "set_probe", "transformers_attention"]  # fmt: skip

_probes: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
# The last two states that a model was looked at in: a refit goes back and forth between the changed and the untouched.
_known: weakref.WeakKeyDictionary[nn.Module, list[Known]] = weakref.WeakKeyDictionary()
# Discoveries with what modules were given, while `looked_at_once` runs: by the model, and the state that it was in.
_whole: ContextVar[list[tuple[nn.Module, _State, Discovery]] | None] = ContextVar("_whole", default=None)


@dataclass
class Known:
    """A discovery without the inputs of the modules, and what it was made of.

    Attributes:
        owned: what belongs to the heads of each attention; empty before it was asked for.
        is_visible: whether the model was seen to run while its attention is looked at.
    """

    discovery: Discovery
    state: _State
    owned: list[Ownership] = field(default_factory=list)
    is_visible: bool = False
    projected: list[Projected] = field(default_factory=list)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """In calling order."""
        return self.discovery.attentions


def set_probe(model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> None:
    """Say under which inputs a model is to be run to find its attention, where none can be made from its forward.

    They hold for this object, as long as it lives; a few tokens are enough, best with a padded row. `None` takes them
    back.

    Args:
        inputs: for `model(**inputs)`.

    Raises:
        TypeError: if `model` is no `PreTrainedModel`.
        ValueError: for inputs that are no mapping, or under which the model does not run; the ones before hold then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers.PreTrainedModel, got {type(model).__name__}; pass the model itself")
    if inputs is None:
        _probes.pop(model, None)
        _known.pop(model, None)
        return
    with transformers_attention(model):
        found = discover(model, inputs)
    _probes[model] = dict(inputs)
    _known[model] = [Known(_spare(found), _State(model))]


def known(model: PreTrainedModel) -> Known:
    """What discovery says about the model as it is now.

    Raises:
        TypeError, ValueError: as `discover`.
    """
    entries = _known.get(model, []) if isinstance(model, nn.Module) else []
    one = next((each for each in entries if each.state.holds(model)), None)
    if one is None:
        one = Known(_spare(discovery(model)), _State(model))
    _known[model] = [one, *(each for each in entries if each is not one)][:2]
    return one


def owned(model: PreTrainedModel) -> list[Ownership]:
    """What belongs to the heads of each attention of `known(model)`.

    Raises:
        TypeError, ValueError: as `discover` and `ownerships`.
    """
    require_runnable(model)
    with looked_at_once():
        one = known(model)
        if not one.owned:
            found = discovery(model)
            with transformers_attention(model):
                one.owned = ownerships(model, found.attentions)
        return one.owned


def projections(model: PreTrainedModel) -> list[Projected]:
    """Which rows make the queries, keys and values of each attention of `known(model)`.

    Raises:
        TypeError, ValueError: as `owned`.
    """
    require_runnable(model)
    with looked_at_once():
        one = known(model)
        if not one.projected:
            found = discovery(model)
            with transformers_attention(model):
                one.owned = one.owned or ownerships(model, found.attentions)
                one.projected = projected(model, found.attentions, one.owned)
        return one.projected


def discovery(model: PreTrainedModel) -> Discovery:
    """What discovery says about the model as it is now, with what each module was given.

    Raises:
        TypeError, ValueError: as `discover`.
    """
    whole = _whole.get()
    for each, state, found in whole or ():
        if each is model and state.holds(model):
            return found
    with transformers_attention(model):
        found = discover(model, _probes.get(model) if isinstance(model, nn.Module) else None)
    if whole is not None:
        whole[:] = [(model, _State(model), found)]
    return found


@contextmanager
def looked_at_once() -> Iterator[None]:
    """For the steps of one change: what modules were given is kept meanwhile, so that the model runs once for all."""
    if _whole.get() is not None:
        yield
        return
    token = _whole.set([])
    try:
        with searched_once():
            yield
    finally:
        _whole.reset(token)


def _spare(found: Discovery) -> Discovery:
    """Without what each module was given, which for long inputs (audio) is as large as all hidden states."""
    return replace(found, attentions=tuple(replace(each, inputs=((), {})) for each in found.attentions))


def part_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs of the model and its parts, each once, from the outside in; T5's encoder and decoder have copies."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    return list(configs.values())


def probe_of(model: nn.Module) -> dict[str, Any] | None:
    """The inputs that `set_probe` was given."""
    return _probes.get(model)


@contextmanager
def probed(model: nn.Module, inputs: Mapping[str, Any] | None) -> Iterator[None]:
    """As between `set_probe(model, inputs)` and taking it back; nothing for `None`."""
    if inputs is None:
        yield
        return
    probe, entries, whole = _probes.get(model), _known.pop(model, None), _whole.get()
    whole = [] if whole is None else whole
    whole.clear()  # what was found before may be of inputs that reach less
    _probes[model] = inputs  # type: ignore[assignment] # `discover` refuses what is no mapping
    try:
        yield
    finally:
        whole.clear()
        for table, before in ((_probes, probe), (_known, entries)):
            if before is None:
                table.pop(model, None)
            else:
                table[model] = before  # type: ignore[assignment]


@contextmanager
def transformers_attention(model: nn.Module, preferred: Mapping[int, str] | None = None) -> Iterator[None]:
    """Each part of the model runs SDPA or eager attention for a while, where it runs something else.

    Args:
        preferred: by the id of a part's config, "sdpa" or "eager", where it is to be that.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)] if _is_module(model) else []
    before = {id(part.config): (part.config, part.config._attn_implementation) for part in parts}
    try:
        for part in parts:
            if before[id(part.config)][1] not in ("sdpa", "eager", None):
                name = "sdpa" if part._supports_sdpa else "eager"
                wanted = (preferred or {}).get(id(part.config))
                name = wanted if wanted in ("sdpa", "eager") else name
                part.config._attn_implementation_internal = name
        yield
    finally:
        for config, name in before.values():
            config._attn_implementation_internal = name


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


class _State:
    """The parameters, their shapes and devices, and the numbers of the configs.

    The inputs that a model was looked at under are on the device that it was on. Parameters that FSDP2 put in the place
    of others, of the same shapes over all devices, change no heads.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(weakref.ref(p), tuple(p.shape), p.device) for p in model.parameters()]
        self._numbers = _numbers(model)

    def holds(self, model: nn.Module) -> bool:
        """Whether the model is still so."""
        parameters = list(model.parameters())
        if len(parameters) != len(self._parameters):
            return False
        same = all(
            shape == tuple(parameter.shape)
            and ((ref() is parameter and device == parameter.device) or is_spread(parameter))
            for parameter, (ref, shape, device) in zip(parameters, self._parameters, strict=True)
        )
        return same and _numbers(model) == self._numbers


def _numbers(model: nn.Module) -> list[dict[str, str]]:
    return [
        {
            name: repr(value)
            for name, value in vars(config).items()
            if name not in _OTHER_FIELDS and isinstance(value, (int, float, str, list, tuple, dict))
        }
        for config in part_configs(model)
    ]
