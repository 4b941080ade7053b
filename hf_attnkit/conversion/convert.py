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

from hf_attnkit.common.state import plain_mode
from hf_attnkit.conversion.plan import planned
from hf_attnkit.conversion.statistics import Statistics
from hf_attnkit.models import known
from hf_attnkit.refitting.options import RefitOptions


@plain_mode()
@known.looked_at_once()
def convert_to_gqa(
    model: PreTrainedModel,
    num_key_value_heads: int | Sequence[int] | None = None,
    *,
    method: str | None = None,
    calibration: Iterable[Mapping[str, Any]] | Statistics | None = None,
    refit: str | bool | RefitOptions | None = None,
    key_method: str | None = None,
    grouping: str | None = None,
    budget: float | None = None,
    uniform: bool = True,
) -> PreTrainedModel:
    """Convert to grouped-query attention: `plan_gqa` with the same arguments, applied.

    `last_change(model)` then says what the conversion did. A Llama or Mistral saved afterwards is a plain GQA
    checkpoint if all layers have the same number; BERT's config has no such field, so a converted BERT reloads with
    `load_pretrained`.

    Before it returns, the model is proven: it puts out what it does with the merged heads
    at full size, each repeated over its group, or, with as many heads as before, what it did.

    Args:
        model: any model that calls Transformers' attention interface; changed in place. It is run on a few tokens to
            find its heads. Grouped models can be grouped further.
        num_key_value_heads: for all layers, or a list with one for each; must divide a layer's present
            number. Default: the largest such number that is at most a quarter of the query heads. The present
            number itself is possible for "pca", which then only changes bases.
        method: how heads are merged. "pca" loses least, "mean" is mean-pooling (Ainslie et al. 2023), the baseline;
            "norm_mean", "procrustes", "first" and "random" are others. See docs/conversion.md. Default: "pca" where
            calibration is given, else "mean".
        calibration: batches of model inputs, for predicted losses, for the second moments that "pca" uses and for the
            refit; or `Statistics`, for the moments alone. Without it inputs are taken to be uncorrelated.
        refit: what is fitted to the untouched model after the merge, layer by layer and without labels: "full"
            (queries, then outputs; queries where they are a linear map of the layer's input and scores are plain
            products under a softmax), "descent" (the same, then all four projections by gradient descent on the layer's
            own error), "output" (output projections), "scale" (one factor per query head) or "none".
            `True` is "full", `False` is "none"; `RefitOptions` say more. Default: "full" where batches are given. Some
            sequences are held out: what brings the model's outputs on them further from the untouched model's is not
            kept, see `last_change`.
        key_method: another method for the keys. Default: `method`; where a norm on the keys forbids "pca" (Qwen3), it
            must be given with `method="pca"`, and is "mean" without `method`.
        grouping: "adjacent" heads, or "best", those that lose least together. Default: "best" where "pca" merges keys
            and values with calibration batches and no layer has more than 16 key/value heads, else "adjacent".
        budget: instead of `num_key_value_heads`, the share of the present key/value cache that may stay, in (0, 1).
        uniform: whether a budget gives every layer the same number, which plain Transformers and other runtimes can
            load; else it is spent over the layers where fewer heads would lose most.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: for a number that does not divide or would change nothing, an unknown method, too few
            calibration tokens, activations or statistics that are not finite, an option that would have no effect, an
            quantized, PEFT-wrapped or weightless model, shared projections, key or value heads that are no rows of one
            matrix, a forward pass that does not run with fewer, or a proof that fails. The model is then unchanged.
    """
    return planned(
        model,
        num_key_value_heads,
        method=method,
        calibration=calibration,
        refit=refit,
        key_method=key_method,
        grouping=grouping,
        budget=budget,
        uniform=uniform,
    ).apply()


def convert_to_mqa(
    model: PreTrainedModel,
    *,
    method: str | None = None,
    calibration: Iterable[Mapping[str, Any]] | Statistics | None = None,
    refit: str | bool | RefitOptions | None = None,
    key_method: str | None = None,
) -> PreTrainedModel:
    """Convert to multi-query attention: `convert_to_gqa` with one key/value head."""
    return convert_to_gqa(model, 1, method=method, calibration=calibration, refit=refit, key_method=key_method)
