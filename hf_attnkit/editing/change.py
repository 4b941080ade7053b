"""Change numbers of heads: weights, module attributes and config together, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.consistency import require_consistent, require_grouping
from hf_attnkit.attention.table import ATTRIBUTE, KEPT, PARAMETERS, Kind
from hf_attnkit.common.state import replace_state
from hf_attnkit.editing import projections
from hf_attnkit.editing.projections import Edit
from hf_attnkit.models.attributes import set_attributes
from hf_attnkit.models.config_heads import WITHOUT_HEADS, write_heads
from hf_attnkit.models.layers import AttentionLayer, attention_layers, editable_layers


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
        layers = editable_layers(model)
        require_consistent(model, layers)
        require_nothing_learned(layers)
        require_unshared(model, layers)
        running = [getattr(layer.module, ATTRIBUTE, Kind(model.config._attn_implementation)).name for layer in layers]
        require_grouping(model, heads, running)
        self._modules = [(layer.module, layer.head_dim) for layer in layers]
        self._config = with_heads(model, heads, empty)
        self._edits = projections.whole(edits)
        owners = (model.config, *(layer.module for layer in layers))
        self._old_states = [(owner, dict(owner.__dict__)) for owner in owners]
        self._undo = [projections.present(edit.linear) for edit in self._edits]

    def apply(self) -> None:
        """Change the model.

        Raises:
            ValueError: if config, weights and attributes do not agree afterwards.
        """
        try:
            for edit in self._edits:
                projections.apply(edit)
            for (module, head_dim), numbers in zip(self._modules, self.heads, strict=True):
                set_attributes(module, *numbers, head_dim)
                module.__dict__.pop(KEPT, None)  # they were of the heads before
            replace_state(self.model.config, self._config.__dict__)
            after = editable_layers(self.model)
            if [(layer.num_heads, layer.num_key_value_heads) for layer in after] != self.heads:
                raise ValueError("the config did not take the new numbers of heads; the model is unchanged")
        except BaseException:
            self.undo()
            raise
        # The parameters now in the modules, so that doing it again brings back these and no copies.
        self._edits = [projections.present(edit.linear) for edit in self._edits]

    def is_current(self) -> bool:
        """Whether the model's projections are still those that the change was computed for."""
        return all(old.linear.weight is old.weight and old.linear.bias is old.bias for old in self._undo)

    def covers(self, linear: nn.Linear) -> bool:
        """Whether the change gives this module new parameters, so that undoing it brings the old ones back."""
        return any(old.linear is linear for old in self._undo)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The model as it was, for a while; then with the change again, as it is now."""
        self._edits = [projections.present(edit.linear) for edit in self._edits]
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
            projections.apply(edit)


def require_nothing_learned(layers: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` if a layer's swapped attention has parameters, which belong to its heads as they are."""
    learned = [layer.index for layer in layers if hasattr(layer.module, PARAMETERS)]
    if learned:
        raise ValueError(
            f"layers {learned} run attention with learned parameters (feature_map='hedgehog'), one set per head; "
            "change the heads first and swap then, or call hf_attnkit.restore_attention(model): the change then "
            "discards them"
        )


def require_unshared(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
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


def with_heads(
    model: PreTrainedModel, heads: Sequence[tuple[int, int]], empty: Iterable[int] | None = None
) -> PreTrainedConfig:
    """A copy of the model's config with `(num_attention_heads, num_key_value_heads)` per layer.

    One number for all layers goes into the plain fields wherever Transformers can build the model
    from them; all else goes into `per_layer_config`.

    Args:
        empty: layers whose one head is a stand-in; by default those that the config names.

    Raises:
        ValueError: for different numbers, in a family that `reads_config`.
    """
    config = copy.deepcopy(model.config)
    write_heads(config, heads, attention_layers(model)[0].head_dim)
    if empty is not None:
        config.__dict__.pop(WITHOUT_HEADS, None)
        if indices := sorted(empty):
            setattr(config, WITHOUT_HEADS, indices)
    return config
