"""Head importance: one file per method, all (num_layers, num_heads), higher = keep."""

from hf_attnkit.importance.head_gradients import head_gradients
from hf_attnkit.importance.head_importance import METHODS, check_method, head_importance
from hf_attnkit.importance.methods.entropy import attention_entropy

__all__ = ["METHODS", "attention_entropy", "check_method", "head_gradients", "head_importance"]
