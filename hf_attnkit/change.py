"""Change numbers of heads: weights, module attributes and config together, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from . import families, surgery
from .attention.registry import ATTRIBUTE, NAME, PARAMETERS, Kind
from .surgery import Edit


def change_heads(model: PreTrainedModel, edits: Sequence[Edit], heads: Sequence[tuple[int, int]]) -> None:
    """Apply `edits` and make everything say `(num_attention_heads, num_key_value_heads)` per layer.

    Everything that can fail is computed by the caller before. If the result still disagrees
    anywhere, or the process is interrupted, the model is put back as it was.

    Raises:
        ValueError: if config, weights and attributes do not agree afterwards.
    """
    layers = families.editable_layers(model)
    require_consistent(model, layers)
    require_nothing_learned(layers)
    running = [getattr(layer.module, ATTRIBUTE, Kind(model.config._attn_implementation)).name for layer in layers]
    require_grouping(model, heads, running)
    config = families.with_heads(model, heads)
    old_states = [(owner, dict(owner.__dict__)) for owner in (model.config, *(layer.module for layer in layers))]
    undo: list[Edit] = []
    try:
        for edit in edits:
            undo.append(surgery.present(edit.linear))  # before, so that nothing is lost if `apply` stops halfway
            surgery.apply(edit)
        for layer, (num_heads, num_key_value_heads) in zip(layers, heads, strict=True):
            families.set_attributes(layer.module, num_heads, num_key_value_heads, layer.head_dim)
        replace_state(model.config, config.__dict__)
        after = families.editable_layers(model)
        if [(layer.num_heads, layer.num_key_value_heads) for layer in after] != list(heads):
            raise ValueError("the config did not take the new numbers of heads; the model is unchanged")
    except BaseException:
        for owner, state in old_states:
            replace_state(owner, state)
        for edit in undo:
            surgery.apply(edit)
        raise


def require_consistent(model: PreTrainedModel, layers: Sequence[families.AttentionLayer]) -> None:
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


def require_nothing_learned(layers: Sequence[families.AttentionLayer]) -> None:
    """Raise `ValueError` if a layer's swapped attention has parameters, which belong to its heads as they are."""
    learned = [layer.index for layer in layers if hasattr(layer.module, PARAMETERS)]
    if learned:
        raise ValueError(
            f"layers {learned} run attention with learned parameters (feature_map='hedgehog'), one set per head; "
            "change the heads first and swap then, or call hf_attnkit.restore_attention(model), which discards them"
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
    if grouped and not families.family_of(model).has_key_value_heads:
        raise ValueError(
            f"Transformers' eager attention has no grouped heads for {model.config.model_type!r}; load "
            f"{type(model).__name__} with attn_implementation='sdpa', call model.set_attn_implementation('sdpa'), or "
            "swap all of its layers (hf_attnkit.swap_attention(model, 'mha'))"
        )


def replace_state(owner: Any, state: dict[str, Any]) -> None:
    """Give the same object (a config, a module) other attributes; others hold it by reference."""
    state = dict(state)
    owner.__dict__.clear()
    owner.__dict__.update(state)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Every module in evaluation mode for a while, then each in the mode that it had."""
    was_training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def is_swapped(model: PreTrainedModel) -> bool:
    """Whether the config says that some layers run one of our implementations."""
    return getattr(model.config, "hf_attnkit", None) is not None
