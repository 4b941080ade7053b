"""Head importance: one file per method, all (num_layers, num_heads), higher = keep."""

from .entropy import attention_entropy
from .per_example import head_gradients
from .score import METHODS, check_method, head_importance

__all__ = ["METHODS", "attention_entropy", "check_method", "head_gradients", "head_importance"]
