"""How the keys of any model may be turned into another basis: found from its gradients."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_attnkit.conversion.owned_heads import OwnedHeads
from hf_attnkit.models.layers import Rope
from hf_attnkit.models.rotary_pairs import rotary_pairs


def rope_of(model: PreTrainedModel, of: OwnedHeads, *, keys: bool) -> Rope | None:
    """How the keys are rotated, for a method that gives heads another basis.

    Args:
        keys: whether keys get another basis, or values alone.

    Raises:
        ValueError: where something between projection and product would not follow, or the rotation cannot be told.
    """
    path = of.attention.path
    if of.query is None or of.output is None or of.others:
        between = ", ".join(of.others) or of.owned.problem or "queries or outputs that are no plain rows of a matrix"
        raise ValueError(
            f"{path}: heads cannot get another basis, which {between} would not follow; give method='mean', "
            "'norm_mean' or 'first'"
        )
    if not keys:
        return None
    pairs = rotary_pairs(model, of.attention, of.owned)
    if pairs is None:
        given = [name for name in of.attention.inputs[1] if "position" in name or "rotary" in name or "rope" in name]
        if given:
            raise ValueError(
                f"{path}: how it rotates its keys ({', '.join(given)}) cannot be told, so they cannot get another "
                "basis; give key_method='mean'"
            )
        return None
    rope = Rope(pairs.pairing, 2 * len(pairs.pairs))
    if pairs.pairing not in ("half", "interleaved") or set(zip(*rope.pairs(), strict=True)) != set(pairs.pairs):
        raise ValueError(
            f"{path}: it rotates its keys in pairs {list(pairs.pairs)[:4]}..., which no method knows; give "
            "key_method='mean'"
        )
    return rope
