"""Whether config, modules and `attn_implementation` of a swapped model agree."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_attnkit.attention.kind import ATTRIBUTE, NAME
from hf_attnkit.models.families import family_of
from hf_attnkit.models.layers import AttentionLayer


def require_consistent(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` if the config names swapped attention that the model does not run.

    Transformers' own functions bring that about: `set_attn_implementation` after a swap, or plain
    `from_pretrained` of a swapped checkpoint.
    """
    if not is_swapped(model):
        return
    running = model.config._attn_implementation
    if running != NAME:
        raise ValueError(
            f"the config says that attention was swapped, but the model runs {running!r}; call "
            f"hf_attnkit.restore_attention(model), or model.set_attn_implementation({NAME!r}) to run the swapped one"
        )
    if not all(hasattr(layer.module, ATTRIBUTE) for layer in layers):
        raise ValueError(
            "the config says that attention was swapped, but the layers were not told; load the checkpoint with "
            "hf_attnkit.load_pretrained"
        )


def require_grouping(model: PreTrainedModel, heads: Sequence[tuple[int, int]], implementations: Sequence[str]) -> None:
    """Raise `ValueError` if a layer's attention implementation cannot run its numbers of heads.

    The eager attention of a family without grouped heads (BERT) multiplies queries and keys as they
    are; with one key/value head that would even run, by broadcasting.
    """
    grouped = any(
        num_heads != num_key_value_heads and implementation == "eager"
        for (num_heads, num_key_value_heads), implementation in zip(heads, implementations, strict=True)
    )
    if grouped and not family_of(model).has_key_value_heads:
        raise ValueError(
            f"Transformers' eager attention has no grouped heads for {model.config.model_type!r}; load "
            f"{type(model).__name__} with attn_implementation='sdpa', call model.set_attn_implementation('sdpa'), or "
            "swap all of its layers (hf_attnkit.swap_attention(model, 'mha'))"
        )


def is_swapped(model: PreTrainedModel) -> bool:
    """Whether the config says that some layers run one of our implementations."""
    return "layers" in (getattr(model.config, "hf_attnkit", None) or {})
