"""The shared test matrix: every kind with the options to test it with. A new kind is one line of `MATRIX`.

What a case must equal is made from its own `seen`, as plain softmax in float64 under that matrix; `pattern` is written
by hand and checks `seen` itself (`test_seen.py`). The rows of the table in docs/attention.md are the cases' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from support.reference import (
    Text,
    attend,
    everything,
    phi,
    plain_hedgehog,
    starting_decay,
    tokens_between,
    window,
    window_and_global,
    window_and_random,
    window_and_sinks,
)
from torch import Tensor

from hf_attnkit.attention.kind import Call, Kind
from hf_attnkit.attention.kinds.flash import FlashAttention
from hf_attnkit.attention.kinds.gqa import GroupedQueryAttention
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.kinds.local_global import LocalGlobalAttention
from hf_attnkit.attention.kinds.mha import MultiHeadAttention
from hf_attnkit.attention.kinds.mqa import MultiQueryAttention
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.kinds.streaming_heads import StreamingHeadsAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common import options


@dataclass(frozen=True)
class Case:
    """One kind under test.

    Attributes:
        kind: with its options.
        pattern: which keys a query sees, written by hand, see `reference`; `None` for all that the mask shows. Where
            heads differ, one for each of the fewest key/value heads that the kind runs with.
        features: of queries and keys, for linear attention; `None` if all keys count by e^score.
        near: for linear attention, which keys count by e^score all the same.
        hidden_rows: padding's own queries follow the pattern too, instead of giving just anything.
        kernel: one of ours computes it, not PyTorch's.
    """

    kind: Kind
    pattern: Callable[[Text], Tensor] | tuple[Callable[[Text], Tensor], ...] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    near: Callable[[Text], Tensor] | None = None
    hidden_rows: bool = True
    kernel: bool = True

    @property
    def patterns(self) -> tuple[Callable[[Text], Tensor], ...]:
        return self.pattern if isinstance(self.pattern, tuple) else () if self.pattern is None else (self.pattern,)

    def heads(self, num_heads: int, num_key_value_heads: int) -> tuple[int, int]:
        """These numbers, or the nearest that the kind runs with, in groups as large."""
        if not self.grouped:
            return num_heads, 1
        group, fewest = num_heads // num_key_value_heads, max(len(self.patterns), num_key_value_heads)
        return group * fewest, fewest

    @property
    def options(self) -> dict[str, Any]:
        return options.changed(self.kind)

    @cached_property
    def exact(self) -> bool:
        """Computes the model's own attention, whatever the sequence."""
        shape = torch.Size((1, max(len(self.patterns), 1), 40, 1))
        seen = self.kind.seen(Mask.aligned(40, 40, is_causal=False), shape).visible()
        return self.kind.forms_scores and (seen is None or bool(seen.all()))

    @cached_property
    def grouped(self) -> bool:
        """Takes more than one key/value head."""
        return not _refuses(lambda: self.kind.check_heads(4, 2))

    @property
    def matrix(self) -> bool:
        """Takes a full (queries x keys) mask, and a bias of the scores."""
        return self.kind.forms_scores

    @property
    def crosses(self) -> bool:
        """Runs in cross-attention too."""
        return not self.kind.self_attention_only

    @cached_property
    def first(self) -> bool:
        """Needs to know where a text begins, which a full mask of a step with a cache does not tell."""
        matrix = torch.ones(1, 1, 2, 8, dtype=torch.bool)
        step = Mask.receive(matrix, 2, 8, is_causal=True, device=matrix.device)
        return _refuses(lambda: self.kind.seen(step, torch.Size((1, 1, 8, 1))))


def _refuses(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


MATRIX: dict[str, Case] = {
    "mha": Case(MultiHeadAttention()),
    "gqa": Case(GroupedQueryAttention()),
    "mqa": Case(MultiQueryAttention()),
    "sliding_window": Case(SlidingWindowAttention(5), partial(window, 5)),
    "sliding_window, sinks": Case(SlidingWindowAttention(5, num_sink_tokens=3), partial(window_and_sinks, 5, 3)),
    "streaming_heads": Case(
        StreamingHeadsAttention((1,), 5, num_sink_tokens=3), (everything, partial(window_and_sinks, 5, 3)), kernel=False
    ),
    "local_global": Case(LocalGlobalAttention(4, num_global_tokens=2), partial(window_and_global, 4, 2)),
    "local_global, random blocks": Case(
        LocalGlobalAttention(2, num_random_blocks=2, block_size=4, seed=3),
        partial(window_and_random, 2, 1, 2, 4, 3),
        hidden_rows=False,
    ),
    "flash": Case(FlashAttention(), kernel=False),
    "flash, tiled": Case(FlashAttention(backend="tiled")),
    "flash, window": Case(FlashAttention(window=7), partial(window, 7)),
    "linear": Case(LinearAttention(), features=phi),
    "linear, hedgehog": Case(LinearAttention("hedgehog"), features=plain_hedgehog),
    "linear, decay": Case(LinearAttention(decay="learned"), features=phi),
    "linear, window, gate": Case(LinearAttention(window=4, gate="learned"), features=phi, near=partial(window, 4)),
}
COVERED = list(dict.fromkeys(case.kind.name for case in MATRIX.values()))  # must be all registered kinds
EXACT = [name for name, case in MATRIX.items() if case.exact]
# Options that make every pattern cover a whole short sequence.
LONG = {
    "sliding_window": {"window": 200},
    "streaming_heads": {"heads": [1], "window": 200},
    "local_global": {"window": 200},
}

# BERT has one key/value head after convert_to_mqa only, see test_swap_save.py and test_conversion.py.
FAMILIES = ("bert", "llama", "mistral")
WITH_FAMILY = [(name, family) for name in MATRIX for family in FAMILIES if family != "bert" or MATRIX[name].grouped]


def kind(name: str) -> str:
    """The kind's name in the name of a case."""
    return MATRIX[name].kind.name if name in MATRIX else name


def run(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **arguments: Any) -> Tensor:
    """The kind's output."""
    used = MATRIX[name].kind
    parameters = used.create_parameters(query.shape[1], key.shape[1], query.shape[3])
    call = Call(parameters=parameters, num_heads=query.shape[1])
    arguments = {"scaling": query.shape[-1] ** -0.5, "call": call} | arguments
    output = used.attention(query, key, value, mask, **arguments)[0]
    rows = open_rows(name, mask)
    return output if rows is None else output.masked_fill(rows, 0.0)


def open_rows(name: str, mask: Mask) -> Tensor | None:
    """`(B, 1, Q, 1)` bool, True for padding's own queries where the case says nothing about them."""
    if MATRIX[name].hidden_rows or mask.key_visible is None:
        return None
    index = (mask.query_position - mask.key_position[:, :1]).expand(mask.key_visible.shape[0], -1)
    return ~mask.key_visible.gather(1, index)[:, None, :, None]


def visible(name: str, mask: Mask, num_heads: int, num_key_value_heads: int) -> Tensor:
    """`(B, 1 or H, Q, K)`: what the kind says that each query sees."""
    parts = (mask.query_position, mask.key_position, mask.key_visible, mask.dense)
    batch = max(len(part) for part in parts if part is not None)
    lengths = mask.query_position.shape[1], mask.key_position.shape[1]
    shape = torch.Size((batch, num_key_value_heads, lengths[1], 1))
    seen = MATRIX[name].kind.seen(mask, shape, Call(num_heads=num_heads)).visible()
    return torch.ones(1, 1, *lengths, dtype=torch.bool) if seen is None else seen


def text(mask: Mask) -> Text:
    """Where the queries and keys of a mask are, from its fields alone."""
    i, j = mask.query_position[:, :, None], mask.key_position[:, None, :]
    first, last = j[..., :1], j[..., -1:]
    if mask.key_visible is not None:
        far = torch.iinfo(torch.long).max // 2
        first = torch.where(mask.key_visible, mask.key_position, far).amin(-1)[:, None, None]
        last = torch.where(mask.key_visible, mask.key_position, -1).amax(-1)[:, None, None]
    return Text(i, j, first, last, mask.is_causal)


def weighing(name: str, mask: Mask, seen: Tensor, num_heads: int, num_key_value_heads: int) -> dict[str, Any]:
    """What `reference.attend` takes as `softmax`, `features` and `factor`.

    Args:
        seen: `(B, 1, Q or 1, K)`, of `visible`.
    """
    case = MATRIX[name]
    if case.features is None:
        return {}
    found = {"features": case.features, "softmax": False if case.near is None else case.near(text(mask))[:, None]}
    if getattr(case.kind, "decay", None) is not None:
        own = mask.query_position - mask.key_position[:, :1]
        left = starting_decay(num_key_value_heads).repeat_interleave(num_heads // num_key_value_heads)
        found["factor"] = left[:, None, None] ** tokens_between(seen, own)
    return found


def expected(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **arguments: Any) -> Tensor:
    """The same by definition."""
    heads = query.shape[1], key.shape[1]
    seen = visible(name, mask, *heads)
    weighed = weighing(name, mask, seen, *heads)
    arguments = {"scaling": query.shape[-1] ** -0.5, "bias": mask.bias} | weighed | arguments
    output = attend(query, key, value, seen, **arguments)
    rows = open_rows(name, mask)
    return output if rows is None else output.masked_fill(rows, 0.0)
