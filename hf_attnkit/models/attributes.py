"""The numbers of heads on an attention module."""

from __future__ import annotations

from torch import nn


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


def set_attributes(module: nn.Module, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
    """Write the numbers of heads onto an attention module.

    `num_key_value_groups` is written even where the class has none (BERT): Transformers' SDPA and
    flash attention read it to group heads.
    """
    for name, value in head_attributes(num_heads, num_key_value_heads, head_dim).items():
        if hasattr(module, name) or name == "num_key_value_groups":
            setattr(module, name, value)
