"""Head importance: one file a method, all (num_layers, num_heads), higher = keep."""

from hf_attnkit.importance.head_gradients import head_gradients
from hf_attnkit.importance.head_importance import METHODS, head_importance, make_score
from hf_attnkit.importance.methods.entropy import attention_entropy

__all__ = ["METHODS", "attention_entropy", "head_gradients", "head_importance", "make_score"]
