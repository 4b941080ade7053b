"""Convert checkpoints to grouped-query and multi-query attention."""

from .convert import METHODS, convert_to_gqa, convert_to_mqa, target_heads

__all__ = ["METHODS", "convert_to_gqa", "convert_to_mqa", "target_heads"]
