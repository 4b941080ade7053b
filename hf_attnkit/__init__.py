"""Attention surgery for Hugging Face Transformers v5.

Importing registers one attention name of our own with Transformers and changes nothing else.
"""

from hf_attnkit.analysis.attention_view import AttentionView, attention_view
from hf_attnkit.analysis.describe_attention import describe_attention
from hf_attnkit.analysis.entropy_callback import AttentionEntropyCallback
from hf_attnkit.analysis.head_statistics import HeadStatistics, head_statistics
from hf_attnkit.attention.attention_backends import attention_backends
from hf_attnkit.attention.cache_bytes import cache_bytes_per_token
from hf_attnkit.attention.dispatch import register
from hf_attnkit.attention.streaming import streaming_kinds
from hf_attnkit.attention.swap import restore_attention
from hf_attnkit.attention.table import available_attentions
from hf_attnkit.common.version import __version__ as __version__
from hf_attnkit.conversion import convert_to_gqa, convert_to_mqa, plan_gqa
from hf_attnkit.editing.last_change import last_change
from hf_attnkit.importance import attention_entropy, head_gradients, head_importance
from hf_attnkit.loading import load_pretrained
from hf_attnkit.models.known import set_probe
from hf_attnkit.pruning.mask_search import rearrange_heads
from hf_attnkit.pruning.prune import prune_heads
from hf_attnkit.pruning.select import select_heads
from hf_attnkit.pruning.select_for_target import select_for_target
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.swap_attention import swap_attention

__all__ = [
    "AttentionEntropyCallback",
    "AttentionView",
    "HeadStatistics",
    "RefitOptions",
    "attention_backends",
    "attention_entropy",
    "attention_view",
    "available_attentions",
    "cache_bytes_per_token",
    "convert_to_gqa",
    "convert_to_mqa",
    "describe_attention",
    "head_gradients",
    "head_importance",
    "head_statistics",
    "last_change",
    "load_pretrained",
    "plan_gqa",
    "prune_heads",
    "rearrange_heads",
    "restore_attention",
    "select_for_target",
    "select_heads",
    "set_probe",
    "streaming_kinds",
    "swap_attention",
]

register()
