"""Types whose layers a table once numbered: version 0.1 named the swapped layers of their checkpoints by these numbers.

They are found by running today, and named by path. A checkpoint of then is told apart before its weights are read, so
the paths are here.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

# config.model_type -> paths from the base model, whose numbers of layers went on from one to the next.
_PATHS = {
    "gpt2": (r"h\.(\d+)\.attn",),
    "gpt_neox": (r"layers\.(\d+)\.attention",),
    "t5": (
        r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention",
        r"decoder\.block\.(\d+)\.layer\.0\.SelfAttention",
        r"decoder\.block\.(\d+)\.layer\.1\.EncDecAttention",
    ),
    "bart": (
        r"encoder\.layers\.(\d+)\.self_attn",
        r"decoder\.layers\.(\d+)\.self_attn",
        r"decoder\.layers\.(\d+)\.encoder_attn",
    ),
}


def attentions_by_number(model: PreTrainedModel) -> list[nn.Module] | None:
    """The modules that attend, by their number of then; `None` for a type that was not numbered so."""
    patterns = _PATHS.get(model.config.model_type)
    if patterns is None:
        return None
    modules = list(model.base_model.named_modules())
    return [module for pattern in patterns for path, module in modules if re.fullmatch(pattern, path)]


def head_numbers(module: nn.Module) -> tuple[int, int, int]:
    """`(num_heads, num_key_value_heads, head_dim)` of one of them; their heads were never merged."""
    own, config = vars(module), vars(module)["config"]
    heads = next((own[name] for name in ("num_heads", "n_heads") if name in own), None) or config.num_attention_heads
    size = next(own[name] for name in ("head_dim", "head_size", "key_value_proj_dim") if name in own)
    return heads, heads, size
