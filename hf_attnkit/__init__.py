"""Attention surgery for Hugging Face Transformers v5.

Importing registers one attention name of our own with Transformers and changes nothing else.
"""

from .attention.registry import available_attentions, register
from .cache_size import cache_bytes_per_token
from .choice import attention_backends
from .conversion import convert_to_gqa, convert_to_mqa, plan_gqa
from .head_statistics import HeadStatistics, head_statistics
from .importance import attention_entropy, head_gradients, head_importance
from .loading import load_pretrained
from .mask_search import rearrange_heads
from .monitoring import AttentionEntropyCallback
from .pruning import prune_heads
from .selection import select_heads
from .swap import restore_attention, swap_attention
from .targets import select_for_target

__version__ = "0.1.0"

__all__ = [
    "AttentionEntropyCallback",
    "HeadStatistics",
    "attention_backends",
    "attention_entropy",
    "available_attentions",
    "cache_bytes_per_token",
    "convert_to_gqa",
    "convert_to_mqa",
    "head_gradients",
    "head_importance",
    "head_statistics",
    "load_pretrained",
    "plan_gqa",
    "prune_heads",
    "rearrange_heads",
    "restore_attention",
    "select_for_target",
    "select_heads",
    "swap_attention",
]

register()
