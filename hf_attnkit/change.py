"""Change numbers of heads: weights, module attributes and config together, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from . import families, surgery
from .attention.registry import ATTRIBUTE, NAME, PARAMETERS, Kind
from .surgery import Edit


class Change:
    """New parameters and numbers of heads for all layers of a model; can be undone and done again.

    Everything that can fail is computed by the caller before. If the result still disagrees
    anywhere, or the process is interrupted, the model is put back as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        edits: Sequence[Edit],
        heads: Sequence[tuple[int, int]],
        empty: Iterable[int] | None = None,
    ) -> None:
        """
        Args:
            heads: `(num_attention_heads, num_key_value_heads)` per layer.
            empty: layers whose one head becomes a stand-in, or is one; by default those that the config names.

        Raises:
            ValueError: for a model whose heads cannot change as it is.
        """
        self.model, self.heads = model, list(heads)
        layers = families.editable_layers(model)
        require_consistent(model, layers)
        require_nothing_learned(layers)
        require_unshared(model, layers)
        running = [getattr(layer.module, ATTRIBUTE, Kind(model.config._attn_implementation)).name for layer in layers]
        require_grouping(model, heads, running)
        self._modules = [(layer.module, layer.head_dim) for layer in layers]
        self._config = families.with_heads(model, heads, empty)
        self._edits = surgery.whole(edits)
        owners = (model.config, *(layer.module for layer in layers))
        self._old_states = [(owner, dict(owner.__dict__)) for owner in owners]
        self._undo = [surgery.present(edit.linear) for edit in self._edits]

    def apply(self) -> None:
        """Change the model.

        Raises:
            ValueError: if config, weights and attributes do not agree afterwards.
        """
        try:
            for edit in self._edits:
                surgery.apply(edit)
            for (module, head_dim), numbers in zip(self._modules, self.heads, strict=True):
                families.set_attributes(module, *numbers, head_dim)
            replace_state(self.model.config, self._config.__dict__)
            after = families.editable_layers(self.model)
            if [(layer.num_heads, layer.num_key_value_heads) for layer in after] != self.heads:
                raise ValueError("the config did not take the new numbers of heads; the model is unchanged")
        except BaseException:
            self.undo()
            raise
        # The parameters now in the modules, so that doing it again brings back these and no copies.
        self._edits = [surgery.present(edit.linear) for edit in self._edits]

    def is_current(self) -> bool:
        """Whether the model's projections are still those that the change was computed for."""
        return all(old.linear.weight is old.weight and old.linear.bias is old.bias for old in self._undo)

    def covers(self, linear: nn.Linear) -> bool:
        """Whether the change gives this module new parameters, so that undoing it brings the old ones back."""
        return any(old.linear is linear for old in self._undo)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The model as it was, for a while; then with the change again, as it is now."""
        self._edits = [surgery.present(edit.linear) for edit in self._edits]
        self.undo()
        try:
            yield
        finally:
            self.apply()

    def undo(self) -> None:
        """Put the model back as it was."""
        for owner, state in self._old_states:
            replace_state(owner, state)
        for edit in self._undo:
            surgery.apply(edit)


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


def require_unshared(model: PreTrainedModel, layers: Sequence[families.AttentionLayer]) -> None:
    """Raise `ValueError` if a projection's weight is used by another module too, which would change with it."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    names = {id(module): name for name, module in model.named_modules()}
    used = [
        id(linear) for layer in layers for linear in dict.fromkeys((layer.query, layer.key, layer.value, layer.output))
    ]
    for layer in layers:
        for linear in (layer.query, layer.key, layer.value, layer.output):
            sharing = owners[id(linear.weight)] - {names[id(linear)]}
            if sharing or used.count(id(linear)) > 1:
                others = ", ".join(sorted(sharing)) or "another layer"
                raise ValueError(
                    f"layer {layer.index}: the weight of {names[id(linear)]} is shared with {others}, which would be "
                    "changed too; give each its own copy first"
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
def evaluation_mode(model: nn.Module) -> Iterator[None]:
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
