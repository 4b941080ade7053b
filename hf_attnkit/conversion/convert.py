"""`convert_to_gqa`: merge key/value heads of a pretrained model into fewer.

    before     q0 q1 q2 q3 q4 q5        after, 2 key/value heads     q0 q1 q2 q3 q4 q5
    (6 over 6) k0 k1 k2 k3 k4 k5                                     \\- k0 -/ \\- k1 -/

Query head h then uses key/value head h // (num_attention_heads // num_key_value_heads), as in
Transformers' `repeat_kv`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_attnkit.common.state import plain_mode
from hf_attnkit.conversion.methods.table import METHODS, uses_statistics
from hf_attnkit.conversion.plan import plan_gqa
from hf_attnkit.conversion.statistics import Statistics
from hf_attnkit.refitting.refit import refit as refit_projections

logger = logging.get_logger(__name__)


@plain_mode()
def convert_to_gqa(
    model: PreTrainedModel,
    num_key_value_heads: int | Sequence[int] | None = None,
    *,
    method: str = "mean",
    calibration: Iterable[Mapping[str, Any]] | Statistics | None = None,
    refit: bool | str | None = None,
    key_method: str | None = None,
    grouping: str = "adjacent",
    budget: float | None = None,
    uniform: bool = True,
) -> PreTrainedModel:
    """Convert to grouped-query attention.

    A Llama or Mistral saved afterwards is a plain GQA checkpoint if all layers have the same number;
    BERT's config has no such field, so a converted BERT reloads with `load_pretrained`. To see what a
    conversion would lose before it is made, call `plan_gqa` with the same arguments.

    Args:
        model: a model of a supported family; changed in place. Grouped models can be grouped further.
        num_key_value_heads: for all layers, or a list with one for each; must divide a layer's present
            number. Default: the largest such number that is at most a quarter of the query heads. The present
            number itself is possible for "pca", which then only changes bases.
        method: "pca" loses least; "mean" is mean-pooling (Ainslie et al. 2023), the baseline; "norm_mean",
            "procrustes", "first" and "random" are others. See docs/conversion.md.
        calibration: batches of model inputs, for the second moments that "pca" uses and for the refit; or
            `Statistics`, for the moments alone. Without it "pca" takes uncorrelated inputs.
        refit: whether to fit the query and output projections to the untouched model afterwards, see
            `hf_attnkit.refit`; "output" fits the output projections alone. Default: if batches are given.
        key_method: another method for the keys, needed where a norm on the keys forbids "pca" (Qwen3).
        grouping: "adjacent" heads, or "best", those that lose least together.
        budget: instead of `num_key_value_heads`, the share of the present key/value cache that may stay.
        uniform: whether a budget gives every layer the same number.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: for a number that does not divide or would change nothing, an unknown method, too few
            calibration tokens, statistics that are not finite, an option that would have no effect, an
            unsupported, quantized, PEFT-wrapped or weightless model, or shared projections. The model is then
            unchanged.
    """
    is_statistics = isinstance(calibration, Statistics)
    if refit is None:
        refit = calibration is not None and not is_statistics
    if not isinstance(refit, bool) and refit != "output":
        raise ValueError(f"refit={refit!r} must be True, False or 'output'")
    if refit and (calibration is None or is_statistics):
        given = "Statistics, which hold no activations" if is_statistics else "none"
        raise ValueError(f"refit={refit!r} needs calibration batches, and calibration is {given}")
    if calibration is not None and not isinstance(calibration, Statistics):
        calibration = list(calibration)
    moments = calibration
    if calibration is not None and not any(uses_statistics(name) for name in (method, key_method) if name in METHODS):
        if not refit and grouping == "adjacent" and uniform:
            raise ValueError(
                f"method {method!r} uses no data, so calibration would have no effect without the refit; leave it out"
            )
        if grouping == "adjacent" and uniform:
            moments = None
    plan = plan_gqa(
        model,
        num_key_value_heads,
        budget=budget,
        uniform=uniform,
        method=method,
        key_method=key_method,
        calibration=moments,
        grouping=grouping,
    )
    change = plan._start()
    if refit:
        order = [[head for group in layer.groups for head in group] for layer in plan.layers]
        refit_projections(change, calibration, order=order if refit is True else None)  # type: ignore[arg-type]
    logger.info(f"converted to grouped-query attention:\n{plan}")
    return model


def convert_to_mqa(
    model: PreTrainedModel,
    *,
    method: str = "mean",
    calibration: Iterable[Mapping[str, Any]] | Statistics | None = None,
    refit: bool | str | None = None,
    key_method: str | None = None,
) -> PreTrainedModel:
    """Convert to multi-query attention: `convert_to_gqa` with one key/value head."""
    return convert_to_gqa(model, 1, method=method, calibration=calibration, refit=refit, key_method=key_method)
