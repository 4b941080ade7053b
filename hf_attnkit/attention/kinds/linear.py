"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), cost linear in the sequence length.

The softmax is replaced by a positive product of features phi, so that sums over keys can be taken
before the query is known:

    out_i = phi(q_i) . S_i / (phi(q_i) . z_i),     S_i = sum_j phi(k_j) v_j^T,     z_i = sum_j phi(k_j)

over all keys (bidirectional) or the keys up to i (causal; chunk by chunk, see `linear_sums`). For
generation S and z are a state of constant size that takes the place of the cache (`LinearState`).

Options: `feature_map`, "elu" (elu(x) + 1), "hedgehog" (learned) or another of `feature_maps`;
`window`, which keeps the nearest keys in exact softmax attention, and `gate` between both (see
`linear_hybrid`); `decay`, by which each token leaves a part of the state before it (see
`linear_decay`). In packed rows the state starts again with each document.

It is a different function than softmax attention: a pretrained softmax model needs training after
the swap. As in the papers, queries and keys are not scaled by `head_dim ** -0.5` before phi.

With Hedgehog and a window the two kinds of terms have different scales: each half of phi sums to 1, so
phi(q) . phi(k) is at most 2 and 2 / head_dim for features that know nothing, while the window's
e^s is 1 for a score of 0 and has no bound. Before training, keys beyond the window therefore count
about head_dim / 2 times less than under softmax. The maps can sharpen, up to 2 a key; beyond that
`gate="learned"` makes up for it, one factor e^g per query head on the window's terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from hf_attnkit.attention.kernels import linear_hybrid, linear_sums, tiled
from hf_attnkit.attention.kernels.feature_maps import FEATURE_MAPS, Map
from hf_attnkit.attention.kernels.linear_decay import Decay, factors
from hf_attnkit.attention.kernels.linear_hybrid import Branches, Gate
from hf_attnkit.attention.kernels.linear_sums import Keys, LinearState
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.window_cache import StateLayer
from hf_attnkit.common.checks import choice, integer
from hf_attnkit.common.options import store

Learned = TypeVar("Learned", bound=nn.Module)


@dataclass(frozen=True)
class LinearAttention(Kind):
    """Forms no weights.

    Attributes:
        feature_map: a name of `FEATURE_MAPS`.
        window: number of keys with softmax terms on each side of a query, its own included; `None` for features alone.
        decay: "learned" for a state of which each token leaves a learned part per key/value head (see `linear_decay`).
            With a window the decay counts from its edge. `None` for a state that keeps all keys alike.
        gate: "learned" for one number g per query head, 0 at the start, by which the window's terms count e^g times
            (see `linear_hybrid`); needs a window. `None` for none.
        branches: "both"; or, to measure what each contributes, what is left of a query's sum: "window", the softmax
            window alone, normalised on its own, or "linear", the keys beyond it alone, normalised on their own, where a
            query without such a key gives 0. The last two need a window.
    """

    name = "linear"
    needs_transfer = True
    takes_documents = True
    self_attention_only = True  # the causal sums take queries and keys of one sequence
    forms_scores = False

    feature_map: str = "elu"
    window: int | None = None
    decay: str | None = None
    gate: str | None = None
    branches: str = "both"

    def __post_init__(self) -> None:
        choice(self.feature_map, "feature_map", tuple(FEATURE_MAPS))
        if self.window is not None:
            why = "the number of keys with softmax terms (the own one included), or None for features alone"
            store(self, window=integer(self.window, "window", minimum=1, why=why))
        if self.decay is not None:
            choice(self.decay, "decay", ("learned",), why="one factor per key/value head and token, or None for none")
        if self.gate is not None:
            choice(self.gate, "gate", ("learned",), why="one number per query head, or None for none")
        choice(self.branches, "branches", ("both", "window", "linear"))
        for option, default in (("gate", None), ("branches", "both")):
            if self.window is None and getattr(self, option) != default:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} needs a window and window=None: without one there is one "
                    f"branch alone; give a window, for example window=64, or {option}={default!r}"
                )

    def seen(self, mask: Mask, shape: torch.Size, call: Call = NO_CALL) -> Mask:
        """All that the mask shows: features reach the keys beyond the window."""
        return mask

    def create_parameters(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> nn.Module | None:
        """The learned maps under `query` and `key`, `decay` and `gate`. A window learns nothing."""
        module = FEATURE_MAPS[self.feature_map].make(num_heads, num_key_value_heads, head_dim)
        if self.decay is None and self.gate is None:
            return module
        module = nn.Module() if module is None else module
        if self.decay is not None:
            module.decay = Decay(num_key_value_heads, head_dim)
        if self.gate is not None:
            module.gate = Gate(num_heads)
        return module

    def create_cache(self, max_length: int | None) -> StateLayer:
        """Sums of constant size, and with a window its last keys and values."""
        return StateLayer(max_length, self.window or 1)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        scaling: float,
        dropout: float = 0.0,
        call: Call = NO_CALL,
    ) -> tuple[Tensor, None]:
        """Attend, as `Kind.attention`.

        There are no attention weights to drop, so `dropout` drops a key's value for all queries alike,
        as weight dropout would if its mask were shared over queries; the normaliser is kept. Weights
        within the window are dropped one by one.

        With a cache, for causal generation, `query` holds the new tokens, and `key` and `value` the new tokens behind
        those kept from before: none, or with a window at most the last `window - 1`. `cache.sums` is of all keys before
        these, and is replaced by the sums that the next call needs: over all keys but the last `window - 1`. Any split
        of a text into calls gives what one pass gives.

        Args:
            scaling: of the scores in the window; features do not use it.

        Raises:
            ValueError: for a full attention matrix or a bias, which features summed over keys cannot
                apply; for missing parameters, or parameters of another number of heads; for keys that do
                not fit the state.
        """
        # Mixed precision would run the sums over the sequence in 16 bits.
        with torch.autocast(query.device.type, enabled=False):
            segments = self._segments(query, key, value, mask, scaling=scaling, dropout=dropout, call=call)
            output = linear_sums.collect(
                (each.output().to(query.dtype) for each in segments), query.new_empty(*query.shape[:3], value.shape[-1])
            )
        return output, None

    def parts(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, call: Call = NO_CALL
    ) -> tuple[Tensor, Tensor]:
        """The two branches' shares of the output of `attention`, without a cache and without dropout.

        Returns:
            What comes from the window (0 without one) and what comes from the keys beyond it, each
            `(B, num_heads, Q, head_dim)` in float32 or better; their sum is the output. With one branch alone the share
            of the other is 0.

        Raises:
            ValueError: as `attention`; for a call with a cache.
        """
        if call.cache is not None:
            raise ValueError("the shares of the branches are of one whole pass; give a call without a cache")
        with torch.autocast(query.device.type, enabled=False):
            segments = self._segments(query, key, value, mask, scaling=scaling, dropout=0.0, call=call)
            near, far = zip(*(each.shares() for each in segments), strict=True)
        return torch.cat(near, dim=2), torch.cat(far, dim=2)

    def _segments(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, dropout: float, call: Call
    ) -> Iterator[Branches]:
        """The branches for each segment of the queries; arguments and errors as `attention`."""
        _check_mask(mask)
        phi_query, phi_key = _maps(self.feature_map, call.parameters)
        gate = None if self.gate is None else _learned("gate", Gate, call.parameters)(query.shape[1])
        decay = None if self.decay is None else _learned("decay", Decay, call.parameters)
        # Made by `create_cache`; of it only the state is used here.
        cache = cast("LinearState | None", call.cache)
        kv_length, width = key.shape[2], self.window or 0
        if cache is not None:
            _check_state(query.shape[2], kv_length, width, mask)

        near = None
        if self.window is not None and self.branches != "linear":
            near = tiled.attend(query, key, value, mask, scaling=scaling, dropout=dropout, window=self.window)
        if self.branches == "window":
            yield Branches(None, near, None)
            return
        kept = None
        if dropout > 0:
            kept = F.dropout(torch.ones(*key.shape[:3], 1, device=key.device), dropout)
        keys = Keys(key, value, phi_key, mask.key_visible, kept, decay, mask.document)
        parts: Iterator[Tensor]
        if cache is None and kv_length <= _at_once_up_to(call.parameters):
            products = self._products(query, keys, mask, call.parameters)
            if width:
                products = products.masked_fill(mask.distance().abs() < width, 0.0)
            parts = iter([_sums(products, keys.values(slice(None)))])
        elif cache is not None:
            parts = linear_sums.prefix(query, phi_query, keys, kv_length - query.shape[2] - width, cache)
        elif mask.is_causal:
            parts = linear_sums.prefix(query, phi_query, keys, mask.offset() - width, LinearState(), width)
        elif self.window is None and decay is None and mask.document is None:
            parts = linear_sums.everything(query, phi_query, keys)
        elif self.window is None:
            parts = linear_hybrid.around(query, phi_query, keys, mask.offset())
        else:
            parts = linear_hybrid.outside(query, phi_query, keys, mask.offset(), self.window)
        start = 0
        for sums in parts:
            stop = start + sums.shape[2]
            of_these = None if near is None else (near[0][:, :, start:stop], near[1][:, :, start:stop])
            yield Branches(_normalise(sums), of_these, gate)
            start = stop
        if cache is not None and width:
            # The key that the last query still had in its window, and the next one has not.
            cache.sums = keys.state(max(kv_length - width, 0), max(kv_length - width + 1, 0), cache.sums)

    def of_any_length(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, call: Call = NO_CALL
    ) -> Tensor:
        """As `Kind.of_any_length`: linear in the length where all queries see all keys, else the products as a matrix.

        With a cache it takes all keys, as softmax attention does, and not the sums of those before.
        """
        _check_mask(mask)
        phi_query, phi_key = _maps(self.feature_map, call.parameters)
        decay = None if self.decay is None else _learned("decay", Decay, call.parameters)
        all_keys = Keys(key, value, phi_key, mask.key_visible, None, decay)
        values = all_keys.values(slice(None))
        if not mask.is_causal and self.window is None and decay is None and mask.document is None:
            keys, _ = all_keys.take(slice(None))
            features = phi_query(query).unflatten(1, (key.shape[1], -1))  # (B, G, H / G, Q, F)
            sums = features @ (keys.transpose(-1, -2) @ values)[:, :, None]
            return _normalise(sums.flatten(1, 2))[0].to(query.dtype)
        products = self._products(query, all_keys, mask, call.parameters)
        if self.window is None:
            return _summed(products, values).to(query.dtype)
        inside = mask.distance().abs() < self.window
        if self.branches == "linear":
            return _summed(products.masked_fill(inside, 0.0), values).to(query.dtype)
        seen = mask.visible()
        near_seen = inside if seen is None else inside & seen
        scores = (query * scaling).unflatten(1, (key.shape[1], -1)) @ key[:, :, None].transpose(-1, -2)
        scores = scores.flatten(1, 2).to(products.dtype).masked_fill(~near_seen, torch.finfo(products.dtype).min)
        total = scores.logsumexp(-1).masked_fill(~near_seen.any(-1), -math.inf)
        near = _sums(scores.softmax(-1).masked_fill(~near_seen, 0.0), values)[..., :-1], total
        if self.branches == "window":
            return Branches(None, near, None).output().to(query.dtype)
        gate = None if self.gate is None else _learned("gate", Gate, call.parameters)(query.shape[1])
        far = _normalise(_sums(products.masked_fill(inside, 0.0), values))
        return Branches(far, near, gate).output().to(query.dtype)

    def _products(self, query: Tensor, keys: Keys, mask: Mask, parameters: nn.Module | None) -> Tensor:
        """phi(q) . phi(k) as a matrix, `(B, H, Q, K)`, decayed, and 0 where the mask shows nothing."""
        groups = keys.key.shape[1]
        if _at_once_up_to(parameters):
            products = parameters.products(query, keys.key)  # type: ignore[union-attr, operator] # those that have it
        else:
            phi_query, phi_key = _maps(self.feature_map, parameters)
            products = phi_query(query).unflatten(1, (groups, -1)) @ phi_key(keys.key)[:, :, None].transpose(-1, -2)
            products = products.flatten(1, 2)
        if keys.decay is not None:
            logs = keys.decays(slice(None))
            counted = factors(logs, mask.distance(), mask.offset(), self.window or 0)[:, :, None]
            products = (products.unflatten(1, (groups, -1)) * counted).flatten(1, 2)
        seen = mask.visible()
        return products if seen is None else products.masked_fill(~seen, 0.0)


def _at_once_up_to(parameters: nn.Module | None) -> int:
    """So many keys are summed through their matrix of products, by a map that makes it without its features.

    Up to as many keys as features the matrix is the smaller of both. 0 for other maps.
    """
    return int(getattr(parameters, "num_features", 0)) if hasattr(parameters, "products") else 0


def _sums(terms: Tensor, values: Tensor) -> Tensor:
    """Sums `(B, H, Q, D + 1)` of values [v, 1] `(B, G, K, D + 1)` under terms `(B, H, Q, K)`."""
    return (terms.unflatten(1, (values.shape[1], -1)) @ values[:, :, None]).flatten(1, 2)


def _summed(terms: Tensor, values: Tensor) -> Tensor:
    """Their mean `(B, H, Q, D)` under terms of one normaliser."""
    return _normalise(_sums(terms, values))[0]


def _normalise(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Output `(B, H, Q, D)` and normaliser `(B, H, Q, 1)` of sums `(B, H, Q, D + 1)`; both 0 for no key."""
    output, total = sums[..., :-1], sums[..., -1:]
    # phi(q) . phi(k) is positive, so a total of zero, or too small to divide by, means no key.
    seen = total > torch.finfo(total.dtype).tiny * 1e8
    return torch.where(seen, output / total.masked_fill(~seen, 1.0), 0.0), total.masked_fill(~seen, 0.0)


def _maps(feature_map: str, parameters: nn.Module | None) -> tuple[Map, Map]:
    """phi for queries and phi for keys."""
    if (fixed := FEATURE_MAPS[feature_map].fixed) is not None:
        return fixed, fixed
    if parameters is None:
        raise ValueError(
            f"feature_map={feature_map!r} is learned and parameters=None; pass the module of "
            f"LinearAttention(feature_map={feature_map!r}).create_parameters(num_heads, num_key_value_heads, head_dim)"
        )
    return parameters.query, parameters.key  # type: ignore[return-value]


def _learned(name: str, kind: type[Learned], parameters: nn.Module | None) -> Learned:
    """The part of the parameters of this name."""
    found = getattr(parameters, name, None)
    if not isinstance(found, kind):
        raise ValueError(
            f"{name}='learned' needs its parameters and the layer has none; pass the module of "
            f"LinearAttention(..., {name}='learned').create_parameters(num_heads, num_key_value_heads, head_dim)"
        )
    return found


def _check_mask(mask: Mask) -> None:
    if mask.bias is not None:
        raise ValueError(
            "'linear' cannot add an attention bias (a float mask) to scores that it never forms; pass a 2-D padding "
            "mask, and use 'mha' or 'gqa' for a model with position biases"
        )
    if mask.dense is not None:
        if is_tracing(mask.dense):
            raise ValueError(
                "'linear' got a full (queries x keys) attention mask in a graph that is compiled or exported, as "
                "Transformers makes of position_ids there, whose values a graph cannot look at: leave position_ids out "
                "or pass a 2-D attention_mask for rows of one text, and run packed rows without torch.compile"
            )
        raise ValueError(
            "'linear' cannot apply a full (queries x keys) attention mask; pass a 2-D padding mask, give packed rows "
            "as position_ids that restart, and set config.sliding_window to None"
        )


def _check_state(q_length: int, kv_length: int, width: int, mask: Mask) -> None:
    kept, most = kv_length - q_length, max(width - 1, 0)
    if not 0 <= kept <= most:
        raise ValueError(
            f"{kv_length} keys for {q_length} queries: with a state, keys are the new tokens behind at most {most} "
            "kept ones (window - 1, or none without a window); all earlier ones are in the state"
        )
    if not mask.is_causal and q_length > 1:
        raise ValueError(
            f"a state with {q_length} bidirectional queries: it holds the past of a causal model; "
            "use_cache=False leaves it out"
        )
