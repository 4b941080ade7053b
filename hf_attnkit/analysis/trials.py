"""What can be done with each attention of a model: tried, on twins that share the model's weights."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_attnkit.attention.consistency import is_swapped
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.attention.swap import restore_attention
from hf_attnkit.attention.table import available_attentions
from hf_attnkit.conversion import convert_to_gqa
from hf_attnkit.importance import head_importance
from hf_attnkit.models import known
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import Discovery
from hf_attnkit.models.layers import without_heads
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships, signature
from hf_attnkit.pruning.prune import prune_heads
from hf_attnkit.refitting.swap_attention import swap_attention

SCORES = ("entropy", "contribution", "magnitude")


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of modules, buffers and configs that has the model's own parameters.

    Changes of heads give modules new parameters and never write into the old ones, so the model does not see them.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():  # such as weights that others compute
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    return copy.deepcopy(model, memo)


@contextmanager
def silent() -> Iterator[None]:
    """No progress bars, warnings and messages of Transformers for a while: what is tried is thrown away."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Trials:
    """Changes of the attentions of one model; those that are alike are tried once.

    Attributes:
        key_value_heads: by the attention's number, those that have parameters of their own.
        score: why heads cannot be scored by one of `SCORES`, or empty.
    """

    def __init__(self, model: PreTrainedModel, found: Discovery, probe: Mapping[str, Any] | None) -> None:
        """
        Args:
            probe: inputs that the user gave.
        """
        self._model, self._found = model, found
        self._probe = dict(probe) if probe is not None else known.probe_of(model)
        self._owned: list[Ownership | None] = []
        with known.transformers_attention(model):
            try:
                self._owned += ownerships(model, found.attentions)
            except ValueError:  # one that does not run alone; the changes say so
                self._owned += [None] * len(found.attentions)
        self.key_value_heads = [
            each.num_key_value_heads if own is None else own.num_key_value_heads
            for each, own in zip(found.attentions, self._owned, strict=True)
        ]
        self._empty = without_heads(model, found.attentions)
        for index in self._empty:
            self.key_value_heads[index] = 0
        self._outcomes: dict[tuple[Any, ...], dict[str, str]] = {}
        self._alike: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._swap_all = self._swap_whole("flash", {})
        self.score = self._score()

    def of(self, attention: Attention) -> dict[str, str]:
        """Why it cannot be swapped, pruned and converted; empty where it can."""
        key = self._key(attention)
        if key not in self._outcomes:
            alike: list[str] = []
            self._outcomes[key] = {
                "swap": self._swap(attention),
                "prune": self._alone_or_alike("prune", self._prune, attention, alike),
                "convert": self._alone_or_alike("convert", self._convert, attention, alike),
            }
            self._alike[key] = tuple(alike)
        return self._outcomes[key]

    def alike(self, attention: Attention) -> tuple[str, ...]:
        """What is possible only in all attentions that are like it at once."""
        self.of(attention)
        return self._alike[self._key(attention)]

    def kinds(self) -> tuple[str, ...]:
        """What can be swapped into all attentions that can be swapped, with the options that it needs."""

        def fits(name: str, options: dict[str, Any]) -> bool:
            return not self._swap_whole(name, options)

        if self._swap_all:
            return ()
        return tuple(name for name in available_attentions() if fits(name, {}) or fits(name, {"window": 64}))

    def _key(self, attention: Attention) -> tuple[Any, ...]:
        runs = repr(getattr(attention.module, ATTRIBUTE, None))
        empty, config = attention.index in self._empty, type(getattr(attention.module, "config", None))
        return *signature(attention), empty, config, runs

    def _copied(self) -> PreTrainedModel:
        copied = twin(self._model)
        if self._probe is not None:
            known.set_probe(copied, self._probe)
        return copied

    @functools.cached_property
    def _lasting(self) -> PreTrainedModel:
        """A twin for what leaves a model as it was: it is copied and looked at once."""
        return self._copied()

    def _try(self, change: Callable[[PreTrainedModel], Any], *, leaves_no_trace: bool = False) -> str:
        """What the change raises, in a sentence; empty if it is made."""
        try:
            with silent():
                change(self._lasting if leaves_no_trace else self._copied())
        except Exception as error:  # whatever a model's code raises says that it cannot be done
            return _sentence(error)
        return ""

    def _alone_or_alike(
        self, name: str, change: Callable[[list[Attention]], str], attention: Attention, alike: list[str]
    ) -> str:
        """The reason why not; first tried in this attention alone, then in all of its sort."""
        if not (reason := change([attention])):
            return ""
        others = [each for each in self._found.attentions if type(each.module) is type(attention.module)]
        if len(others) > 1 and not change(others):
            alike.append(name)
            return ""
        return _without(reason, attention.path)

    def _swap_whole(self, name: str, options: Mapping[str, Any]) -> str:
        if is_swapped(self._model):  # to restore it would restore what is not to be tried
            return self._try(lambda each: swap_attention(each, name, **options))
        return self._try(lambda each: restore_attention(swap_attention(each, name, **options)), leaves_no_trace=True)

    def _swap(self, attention: Attention) -> str:
        if not attention.calls_interface:
            return attention.reason
        if not self._swap_all:
            return ""
        return _without(self._try(lambda each: swap_attention(each, "flash", layers=[attention.path])), attention.path)

    def _score(self) -> str:
        inputs = {name: value for name, value in self._found.inputs.items() if name != "use_cache"}
        reasons: dict[str, list[str]] = {}
        for method in SCORES:
            scores = functools.partial(head_importance, batches=[inputs], method=method)
            if reason := self._try(scores, leaves_no_trace=True):
                reasons.setdefault(reason, []).append(method)
        if len(reasons) == 1 and len(next(iter(reasons.values()))) == len(SCORES):
            return next(iter(reasons))
        return "; ".join(f"not by {' or '.join(methods)}: {reason}" for reason, methods in reasons.items())

    def _prune(self, attentions: list[Attention]) -> str:
        heads = {each.path: self._a_group(each) for each in attentions}
        return self._try(lambda each: prune_heads(each, heads, probe=self._probe))

    def _a_group(self, attention: Attention) -> list[int]:
        """The query heads of the first key/value head; the first head where that would be all."""
        own, number = self._owned[attention.index], attention.num_heads
        groups = attention.num_key_value_heads
        first = [h for h in range(number) if (own.key_head_of(h, number) if own else h * groups // number) == 0]
        return first if len(first) < number else [0]

    def _convert(self, attentions: list[Attention]) -> str:
        numbers = list(self.key_value_heads)
        if attentions[0].index in self._empty:
            return "it has no heads left; convert first, and remove all heads of a layer after"
        if numbers[attentions[0].index] == 1:
            return "it has one key/value head"
        for each in attentions:
            numbers[each.index] = _largest_divisor(numbers[each.index])
        numbers = [max(1, number) for number in numbers]
        return self._try(lambda each: convert_to_gqa(each, numbers, method="mean"))


def _largest_divisor(number: int) -> int:
    return next((n for n in range(number - 1, 0, -1) if number % n == 0), 1)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: {text}"
    return re.sub(r"; the model is unchanged\.?( |$)", r"\1", text)


def _without(reason: str, path: str) -> str:
    """The reason as it holds for all attentions that are alike."""
    return re.sub(rf"^(layer \d+ )?\(?{re.escape(path)}\)?:? ", "", reason)
