"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), without repeating keys and values.

query heads      0 1 2 3 | 4 5 6 7        consecutive heads form a group
key/value heads     0    |    1           and share one key and one value head
"""

from __future__ import annotations

from hf_attnkit.attention.kernels.packed import attention as attention

OWN_WINDOW = True


def check(num_heads: int, num_key_value_heads: int) -> None:
    """Any number of groups is fine, one head per group (multi-head) included."""
