"""Types whose layers a table once numbered: version 0.1 named the layers of their checkpoints by these numbers.

They are found by running today, and named by path. A checkpoint of then is told apart before its weights are read, so
the paths are here.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.models.without_heads import HEADS_LEFT

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
    "distilbert": (r"transformer\.layer\.(\d+)\.attention",),
    "vit": (r"layers\.(\d+)\.attention",),
}
_BERT = ("bert", "roberta", "electra")
_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "stablelm", "phi", "phi3", "cohere", "glm")
_PATHS |= dict.fromkeys(_BERT, (r"encoder\.layer\.(\d+)\.attention\.self",))
_PATHS |= dict.fromkeys(_LLAMA, (r"layers\.(\d+)\.self_attn",))

# Of these the config said the heads of each layer; the first know no `num_key_value_heads` of their own.
UNGROUPED = (*_BERT, "distilbert", "vit")
CUT = (*UNGROUPED, *_LLAMA)


def attentions_by_number(model: PreTrainedModel) -> list[nn.Module] | None:
    """The modules that attend, by their number of then; `None` for a type that was not numbered so."""
    patterns = _PATHS.get(model.config.model_type)
    if patterns is None:
        return None
    modules = list(model.base_model.named_modules())
    return [module for pattern in patterns for path, module in modules if re.fullmatch(pattern, path)]


def output_outside(model_type: str, path: str) -> str | None:
    """The path of an attention's output projection, where it is in another module."""
    return f"{path.removesuffix('.self')}.output.dense" if model_type in _BERT else None


def size_of_heads(module: nn.Module) -> int:
    """The size of a head of one of them."""
    names = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
    return int(next(vars(module)[name] for name in names if name in vars(module)))


def head_numbers(module: nn.Module) -> tuple[int, int, int]:
    """`(num_heads, num_key_value_heads, head_dim)` of one of them."""
    own, config = vars(module), vars(module)["config"]
    names = (HEADS_LEFT, "num_heads", "n_heads", "num_attention_heads")
    heads = next((own[name] for name in names if own.get(name)), None) or config.num_attention_heads
    return heads, heads // own.get("num_key_value_groups", 1), size_of_heads(module)
