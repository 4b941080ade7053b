"""Change numbers of heads: weights, module attributes and config together, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.consistency import require_consistent, require_grouping
from hf_attnkit.attention.kind import ATTRIBUTE, KEPT, NAME, PARAMETERS, Stock
from hf_attnkit.editing import projections
from hf_attnkit.editing.projections import Edit
from hf_attnkit.models.attributes import set_attributes
from hf_attnkit.models.config_heads import WITHOUT_HEADS, is_rebuilt_by_stock, write_heads
from hf_attnkit.models.layers import AttentionLayer, attention_layers, editable_layers


class Change:
    """New parameters and numbers of heads for all layers of a model, computed and not yet made.

    Everything that can fail is computed by the caller before.
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
        running = [getattr(layer.module, ATTRIBUTE, Stock(model.config._attn_implementation)).name for layer in layers]
        require_grouping(model, layers, heads, running)
        self._empty = None if empty is None else sorted(empty)
        with_heads(model, heads, self._empty)  # refuses what the config cannot say
        self._modules = [(layer.module, layer.head_dim) for layer in layers]
        self._edits = projections.whole(edits)

    @contextmanager
    def made(self) -> Iterator[MadeChange]:
        """Change the model, then run the block; an error in either, also an interruption, puts the model back.

        Only fields that hold numbers of heads are written, into the config and the modules as they are now. The block
        may replace parameters and must not write into them: a change that failed can then be made again.

        Raises:
            ValueError: if config, weights and attributes do not agree afterwards.
        """
        made = MadeChange(
            [self.model.config, *(module for module, _ in self._modules)], [edit.linear for edit in self._edits]
        )
        try:
            for edit in self._edits:
                projections.apply(edit)
            for (module, head_dim), numbers in zip(self._modules, self.heads, strict=True):
                set_attributes(module, *numbers, head_dim)
                module.__dict__.pop(KEPT, None)  # they were of the heads before
            _write(self.model.config, self.heads, self._modules[0][1], self._empty)
            after = editable_layers(self.model)
            if [(layer.num_heads, layer.num_key_value_heads) for layer in after] != self.heads:
                raise ValueError("the config did not take the new numbers of heads; the model is unchanged")
            yield made
        except BaseException:
            made.undo()
            raise


class MadeChange:
    """A change that was made: knows what the model was before, so that it can be undone, for a while or for good."""

    def __init__(self, owners: Sequence[Any], linears: Sequence[nn.Linear]) -> None:
        """
        Args:
            owners: objects of which attributes will be written: the config and attention modules.
            linears: modules whose parameters will be replaced.
        """
        self._owners = owners
        self._old_fields = [dict(owner.__dict__) for owner in owners]
        self._old_parameters = [projections.present(linear) for linear in linears]

    def covers(self, linear: nn.Linear) -> bool:
        """Whether undoing brings back this module's old parameters."""
        return any(old.linear is linear for old in self._old_parameters)

    def undo(self) -> None:
        """Put the model back as it was."""
        self._put(self._changed_fields()[0], self._old_parameters)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The model as it was, while the block runs; then with the change again, as it is now."""
        old_fields, new_fields = self._changed_fields()
        new_parameters = [projections.present(old.linear) for old in self._old_parameters]
        self._put(old_fields, self._old_parameters)
        try:
            yield
        finally:
            self._put(new_fields, new_parameters)

    def _changed_fields(self) -> tuple[list[_Field], list[_Field]]:
        """The attributes that were written: as they were before, and as they are now."""
        before, now = [], []
        for owner, old in zip(self._owners, self._old_fields, strict=True):
            new = owner.__dict__
            for name in old.keys() | new.keys():
                if old.get(name, _ABSENT) is not new.get(name, _ABSENT):
                    before.append((owner, name, old.get(name, _ABSENT)))
                    now.append((owner, name, new.get(name, _ABSENT)))
        return before, now

    @staticmethod
    def _put(fields: Sequence[_Field], parameters: Sequence[Edit]) -> None:
        for owner, name, value in fields:
            if value is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
        for edit in parameters:
            projections.apply(edit)


_ABSENT = object()
_Field = tuple[Any, str, Any]  # owner, name, value; `_ABSENT` where the owner has no such attribute


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
    _write(config, heads, attention_layers(model)[0].head_dim, empty)
    return config


def _write(
    config: PreTrainedConfig, heads: Sequence[tuple[int, int]], head_dim: int, empty: Iterable[int] | None
) -> None:
    """See `with_heads`; in place."""
    write_heads(config, heads, head_dim)
    if empty is not None:
        config.__dict__.pop(WITHOUT_HEADS, None)
        if indices := sorted(empty):
            setattr(config, WITHOUT_HEADS, indices)
    _name_what_loads_it(config)


def _name_what_loads_it(config: PreTrainedConfig) -> None:
    """Let plain `from_pretrained` refuse by our name what it cannot build; its own message is one of sizes."""
    if "layers" in (getattr(config, "hf_attnkit", None) or {}):
        return  # swapped: refused already
    if is_rebuilt_by_stock(config):
        if config.__dict__.get("attn_implementation") == NAME:
            del config.attn_implementation
    else:
        config.attn_implementation = NAME
