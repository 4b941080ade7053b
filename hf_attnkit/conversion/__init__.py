"""Convert checkpoints to grouped-query and multi-query attention."""

from .checkpoint import ConvertedCheckpoint, convert_checkpoint
from .convert import convert_to_gqa, convert_to_mqa
from .methods import METHODS
from .plan import GQAPlan, plan_gqa
from .statistics import Statistics

__all__ = [
    "METHODS",
    "ConvertedCheckpoint",
    "GQAPlan",
    "Statistics",
    "convert_checkpoint",
    "convert_to_gqa",
    "convert_to_mqa",
    "plan_gqa",
]
