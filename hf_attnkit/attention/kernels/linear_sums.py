"""Sums of phi(k) v^T over keys, multiplied with phi(q): over all keys, or a prefix that grows with the query.

    B batch   G key/value heads   H query heads   Q queries   K keys   D head_dim   F features

A state is the sum of phi(k) [v, 1]^T over some keys, `(B, G, F, D + 1)`: the column of ones carries
the normaliser through the same sums as the values. A result `(B, H, Q, D + 1)` is phi(q) . state.
Where a token leaves only a part of the state before it (`Keys.keeps`), the sums are weighed so.
Both are float32, or float64 for float64 inputs. Results come in segments of the queries, each to be
used up before the next is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.kernels.feature_maps import Map
from hf_attnkit.attention.kernels.feature_maps.wide import wide
from hf_attnkit.attention.kernels.linear_decay import after, spans

# Tokens that are mapped and summed at a time, so that temporaries have one size whatever the length:
# on a CPU larger ones are fresh pages each time, and four times the tokens took ten times the time.
SEGMENT = 1024
# The same for a map of many features on a CPU: so many of them for each head at a time, but at least four chunks.
NUMBERS = 2**19
# Tokens in a chunk, C. For the backward pass the causal form keeps, per token and key/value head,
# F (D + 1) / C numbers of chunk states, (H / G) C of products within the chunk, and (1 + H / G) F
# features: linear in the length whatever C. At 64 no term is more than twice another for head sizes
# of 64 and 128, and both larger and smaller chunks were slower.
CHUNK = 64


@dataclass
class LinearState:
    """All that generation needs of the keys that are no longer given. Its size does not grow.

    Attributes:
        sums: `(B, G, F, D + 1)`, the state over those keys, padding left out; `None` before the first token.
    """

    sums: Tensor | None = None


@dataclass(frozen=True)
class Keys:
    """Keys and values, mapped when they are summed.

    Attributes:
        key, value: `(B, G, K, D)`.
        phi: the feature map.
        visible: `(B, K)` bool, False for padding; `None` when every key is real.
        kept: `(B, G, K, 1)`, dropout factors of the values.
        decay: from keys `(B, G, tokens, D)` the logarithm of what each leaves of the state before it, `(B, G, tokens)`;
            `None` for all of it.
        document: `(B, K)`, integer, of each key: the state starts again with each document; `None` for one.
    """

    key: Tensor
    value: Tensor
    phi: Map
    visible: Tensor | None
    kept: Tensor | None
    decay: Map | None = None
    document: Tensor | None = None

    @property
    def length(self) -> int:
        return self.key.shape[2]

    def take(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """phi(k) `(B, G, tokens, F)`, 0 for padding, and [v, 1] `(B, G, tokens, D + 1)`."""
        keys = self.phi(self.key[:, :, tokens])
        if self.visible is not None:
            keys = keys * self.visible[:, None, tokens, None]
        return keys, self.values(tokens)

    def values(self, tokens: slice) -> Tensor:
        """[v, 1] `(B, G, tokens, D + 1)`."""
        values = wide(self.value[:, :, tokens])
        if self.kept is not None:
            values = values * self.kept[:, :, tokens]
        return F.pad(values, (0, 1), value=1.0)

    def decays(self, tokens: slice | Tensor) -> Tensor:
        """ln a_t, `(B, G, tokens)`; 0 for padding, which leaves the state as it is."""
        assert self.decay is not None
        logs = self.decay(self.key[:, :, tokens])
        return logs if self.visible is None else logs.masked_fill(~self.visible[:, None, tokens], 0.0)

    def keeps(self, tokens: slice) -> Tensor | None:
        """The logarithm of what each token leaves of the state before it, `(B, G or 1, tokens)`; `None` for all of it.

        That of a decay, and -inf where a document begins.
        """
        logs = None if self.decay is None else self.decays(tokens)
        if self.document is None:
            return logs
        begins = F.pad(self.document.diff(dim=1) != 0, (1, 0))[:, None, tokens]
        if logs is None:
            logs = torch.zeros(begins.shape, dtype=wide(self.key[:, :0]).dtype, device=begins.device)
        return logs.masked_fill(begins, -torch.inf)

    def state(self, start: int, stop: int, earlier: Tensor | None = None) -> Tensor:
        """The state over the keys `start` to `stop`, and over those of `earlier`."""
        # At least one segment, if an empty one: its sum is the zeros to begin with.
        size = segment(self.phi, self.key[:, :, start:stop])
        for begin in range(start, max(stop, start + 1), size):
            tokens = slice(begin, min(begin + size, stop))
            keys, values = self.take(tokens)
            if (keeps := self.keeps(tokens)) is not None:
                keys = keys * after(keeps).exp()[..., None]
                earlier = None if earlier is None else earlier * keeps.sum(-1).exp()[..., None, None]
            sums = keys.transpose(-1, -2) @ values
            earlier = sums if earlier is None else earlier + sums
        return earlier  # type: ignore[return-value]

    def flip(self) -> Keys:
        """The last key first."""
        visible = None if self.visible is None else self.visible.flip(1)
        kept = None if self.kept is None else self.kept.flip(2)
        document = None if self.document is None else self.document.flip(1)
        return Keys(self.key.flip(2), self.value.flip(2), self.phi, visible, kept, self.decay, document)


def segment(phi: Map, x: Tensor) -> int:
    """Tokens of `x` `(B, heads, tokens, D)` that are mapped at a time."""
    if x.device.type != "cpu" or x.shape[2] <= 4 * CHUNK:
        return SEGMENT
    features = phi(x[:, :, :0]).shape[-1]
    return min(SEGMENT, max(4, NUMBERS // features // CHUNK) * CHUNK)


def everything(query: Tensor, phi: Map, keys: Keys) -> Iterator[Tensor]:
    """Every query sees every key."""
    state = keys.state(0, keys.length)
    for part in query.split(segment(phi, query), 2):
        yield _apply(phi(part), state)


def prefix(query: Tensor, phi: Map, keys: Keys, last: int, state: LinearState, gap: int = 0) -> Iterator[Tensor]:
    """Query i sees the keys up to and including `last + i` (which may lie before the first or after
    the last key), and those of `state`, which takes in the keys as they are passed. Its own token is
    `gap` keys further on, which may be in another document; it then sees nothing."""
    start = min(max(last, 0), keys.length)
    sums = keys.state(0, start, state.sums)
    for part in query.split(segment(phi, query), 2):
        stop = min(max(last + part.shape[2], start), keys.length)
        hidden = min(max(-last, 0), part.shape[2])  # queries before the first key
        tokens = slice(start, stop)
        result, sums = _segment(phi(part), *keys.take(tokens), keys.keeps(tokens), hidden, sums)
        if keys.document is not None and gap:
            read = torch.arange(last, last + part.shape[2], device=query.device)
            read, own = (place.clamp(0, keys.length - 1) for place in (read, read + gap))
            result = result * (keys.document[:, read] == keys.document[:, own])[:, None, :, None]
        yield result
        start, last = stop, last + part.shape[2]
    state.sums = sums.clone()  # not a view that keeps the states of all chunks


def suffix(query: Tensor, phi: Map, keys: Keys, first: int, gap: int) -> Tensor:
    """Query i sees the keys from `first + i` on, its own token being `gap` keys before that: `prefix` read backwards,
    so in one piece."""
    # The last query comes first, and the key `first + Q - 1`, its first, is then its last.
    last = keys.length - 1 - (first + query.shape[2] - 1)
    return torch.cat(list(prefix(query.flip(2), phi, keys.flip(), last, LinearState(), gap)), dim=2).flip(2)


def collect(segments: Iterator[Tensor], output: Tensor) -> Tensor:
    """The segments in a row: one by one into the empty `output`, unless autograd has to follow."""
    if torch.is_grad_enabled():  # a chain of writes would copy the whole gradient for every segment
        return torch.cat(list(segments), dim=2)
    start = 0
    for segment in segments:
        output[:, :, start : start + segment.shape[2]] = segment
        start += segment.shape[2]
    return output


def _segment(
    queries: Tensor, keys: Tensor, values: Tensor, keeps: Tensor | None, hidden: int, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Query `hidden + i` sees keys 0 to i and `state`; earlier ones only `state`. Also returns the
    state with these keys. `keeps`: as `Keys.keeps`.

    Chunk by chunk: the state of what lies before the chunk, and a triangular product within.
    """
    if keys.shape[2] == 0:
        return _apply(queries, state), state
    num_groups, length = keys.shape[1], queries.shape[2]
    chunk = min(CHUNK, length)
    padded = length + -length % chunk
    place = (0, 0, hidden, padded - hidden - keys.shape[2])
    keys, values = (F.pad(tensor, place).unflatten(2, (-1, chunk)) for tensor in (keys, values))
    # "b (n g) (c i) f -> b n c (g i) f": the heads of a group as one tall matrix, so that neither
    # keys nor states are copied for each of them.
    tall = F.pad(queries, (0, 0, 0, padded - length)).unflatten(2, (-1, chunk)).unflatten(1, (num_groups, -1))
    tall = tall.transpose(2, 3).flatten(3, 4)

    within = (tall @ keys.transpose(-1, -2)).unflatten(3, (-1, chunk))
    if keeps is None:
        states = state[:, :, None] + (keys.transpose(-1, -2) @ values).cumsum(2)  # (B, G, chunks, F, D + 1)
        before, state = torch.cat([state[:, :, None], states[:, :, :-1]], dim=2), states[:, :, -1]
        result = within.tril().flatten(3, 4) @ values + tall @ before
    else:
        keeps = F.pad(keeps, place[2:]).unflatten(2, (-1, chunk))  # (B, G or 1, chunks, C)
        factor = spans(keeps).exp()  # of key j for query i, at [i, j]
        sums = (keys * factor[..., -1, :, None]).transpose(-1, -2) @ values
        # From chunk to chunk by a triangular matrix too: what each leaves of the states before it.
        chain = spans(F.pad(keeps.sum(-1), (1, 0))).exp()
        states = torch.cat([state[:, :, None], sums], dim=2)
        states = (chain @ states.flatten(3)).unflatten(3, states.shape[3:])
        before, state = states[:, :, :-1], states[:, :, -1]
        entered = keeps.cumsum(-1).exp()[:, :, :, None, :, None]  # of the state before the chunk
        result = (within * factor[:, :, :, None]).flatten(3, 4) @ values
        result = result + ((tall @ before).unflatten(3, (-1, chunk)) * entered).flatten(3, 4)
    result = result.unflatten(3, (-1, chunk)).transpose(2, 3)
    return result.flatten(1, 2).flatten(2, 3)[:, :, :length], state


def _apply(queries: Tensor, state: Tensor) -> Tensor:
    """phi(q) . state for every query."""
    stacked = queries.reshape(queries.shape[0], state.shape[1], -1, queries.shape[-1])
    return (stacked @ state).view(*queries.shape[:3], -1)
