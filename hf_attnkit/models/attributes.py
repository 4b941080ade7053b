"""The numbers of heads on an attention module."""

from __future__ import annotations


def head_attributes(num_heads: int, num_key_value_heads: int, head_dim: int) -> dict[str, int]:
    """What attention modules call these numbers; a module has some of them."""
    return {
        "num_attention_heads": num_heads,
        "num_heads": num_heads,
        "n_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_key_value_groups": num_heads // num_key_value_heads,
        "all_head_size": num_heads * head_dim,
    }
