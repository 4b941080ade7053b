"""Convert checkpoints to grouped-query and multi-query attention."""

from hf_attnkit.conversion.checkpoints.convert_checkpoint import ConvertedCheckpoint, convert_checkpoint
from hf_attnkit.conversion.convert import convert_to_gqa, convert_to_mqa
from hf_attnkit.conversion.methods.table import METHODS
from hf_attnkit.conversion.plan import GQAPlan, plan_gqa
from hf_attnkit.conversion.report import ConversionReport, LayerPlan
from hf_attnkit.conversion.statistics import Statistics

__all__ = [
    "METHODS",
    "ConversionReport",
    "ConvertedCheckpoint",
    "GQAPlan",
    "LayerPlan",
    "Statistics",
    "convert_checkpoint",
    "convert_to_gqa",
    "convert_to_mqa",
    "plan_gqa",
]
