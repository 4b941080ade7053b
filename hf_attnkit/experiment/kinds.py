"""A kind of attention as a command line says it in one word: `sliding_window:window=64,num_sink_tokens=4`.

Heads that stream are given as a share of all: `streaming_heads:share=0.5,window=256`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.attention import swap
from hf_attnkit.common.checks import choice
from hf_attnkit.experiment.pruning import parse_options

STREAMING = "streaming_heads"
OF_STREAMING = ("window", "num_sink_tokens", "cache_dtype")


@dataclass(frozen=True)
class GivenKind:
    """
    Attributes:
        word: what was given.
        name: the kind.
        options: its options, the share of heads that stream left out.
        share: of the key/value heads, those that stream; `None` for another kind.
    """

    word: str
    name: str
    options: dict[str, Any]
    share: float | None

    def specification(self, model: PreTrainedModel, score: Callable[..., Tensor]) -> Any:
        """What `swap_attention` takes for this model.

        Args:
            score: `(num_layers, num_heads)` for the window's options; the lowest stream.
        """
        if self.share is None:
            return self.name, self.options
        seen = {name: value for name, value in self.options.items() if name != "cache_dtype"}
        heads = hf_attnkit.select_heads(score(**seen), fraction=self.share, min_heads=0, model=model)
        if not any(heads.values()):
            raise ValueError(f"{self.word!r}: a share of {self.share} of the heads is less than one; give a larger one")
        return hf_attnkit.streaming_kinds(heads, model, **self.options)

    def check(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` for options that the kind does not have, or that do not fit the model."""
        if self.share is None:
            swap.check(model, (self.name, self.options))
        else:  # a window with the same options
            swap.check(model, ("sliding_window", {"num_sink_tokens": 4, **self.options}))


def parse_kind(text: str, flag: str) -> GivenKind:
    """The kind that is meant.

    Args:
        flag: what it was given to, for the message.

    Raises:
        ValueError: for another kind, or a share that is none.
    """
    name, colon, rest = text.partition(":")
    choice(name, flag, hf_attnkit.available_attentions())
    if bool(colon) != bool(rest):
        raise ValueError(f"{flag} {text!r} ends in a colon: give options, as in flash:cache_dtype=int8, or none")
    options = parse_options(rest.split(",") if rest else [], f"{flag} {text!r}: the option")
    if name != STREAMING:
        return GivenKind(text, name, options, None)
    share = options.pop("share", None)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(
            f"{flag} {text!r} must say which share of the key/value heads streams, above 0 and below 1, as in "
            f"{STREAMING}:share=0.5,window=256"
        )
    if unknown := [option for option in options if option not in OF_STREAMING]:
        raise ValueError(f"{flag} {text!r}: option {unknown[0]!r} must be one of share, {', '.join(OF_STREAMING)}")
    if "window" not in options:
        raise ValueError(f"{flag} {text!r} must say a window, as in {STREAMING}:share=0.5,window=256")
    return GivenKind(text, name, options, float(share))
