"""Feature maps of linear attention, one a file: a new map is its file and its line in `FEATURE_MAPS`.

A map phi turns queries and keys into features, and phi(q) . phi(k) takes the place of exp(scaling * q . k). That
product must be positive for every query and key; single features may be negative. Maps of queries and keys may differ,
and give as many features. Features are in float32 or better (`wide`): sums over the sequence follow.

| map                  | product or phi                                   | features, r = head_dim | learned by heads |
| -------------------- | ------------------------------------------------ | ---------------------- | ---------------- |
| `elu`                | phi(x) = elu(x) + 1                              | r                      | nothing          |
| `hedgehog`           | phi(x) = [softmax(W x + b), softmax(-(W x + b))] | 2 r                    | W, b             |
| `hedgehog_weighted`  | w(k) hedgehog(q) . hedgehog(k)                   | 2 r                    | W, b, w          |
| `exponential`        | w(k) sum_f e^(c_f(q) + d_f(k))                   | 8 r                    | c, d, w          |
| `taylor`             | w(k) (1 + s + s^2 / 2), s = a(q) . a(k)          | 1 + r + r (r // 2 + 1) | a, w             |
| `taylor_exponential` | the same and w(k) sum_f e^(c_f(q) + d_f(k))      | r more                 | c, d too         |

A map may have `products`, which gives phi(q) . phi(k) as a matrix
without the features, and `num_features`: up to so many keys that is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.elu import elu
from hf_attnkit.attention.kernels.feature_maps.exponential import Exponential
from hf_attnkit.attention.kernels.feature_maps.hedgehog import Hedgehog
from hf_attnkit.attention.kernels.feature_maps.hedgehog_weighted import WeightedHedgehog
from hf_attnkit.attention.kernels.feature_maps.taylor import Taylor
from hf_attnkit.attention.kernels.feature_maps.taylor_exponential import TaylorExponential

Map = Callable[[Tensor], Tensor]
"""`(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, features)`."""


def _nothing(num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
    return None


@dataclass(frozen=True)
class FeatureMap:
    """How a map is made.

    Attributes:
        make: of a learned map: `(num_heads, num_key_value_heads, head_dim)` to a module of its own class with the maps
            `query` and `key`, at their start values; nothing for a fixed map.
        fixed: of a fixed map: the function, for queries and keys alike.
    """

    make: Callable[[int, int, int], nn.Module | None] = _nothing
    fixed: Map | None = None


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu": FeatureMap(fixed=elu),
    "hedgehog": FeatureMap(Hedgehog),
    "hedgehog_weighted": FeatureMap(WeightedHedgehog),
    "exponential": FeatureMap(Exponential),
    "taylor": FeatureMap(Taylor),
    "taylor_exponential": FeatureMap(TaylorExponential),
}
"""By the name that `LinearAttention(feature_map=...)` takes."""
