"""New key/value heads for models of the table, proven when they are made.

    full size    k0 k0 k0 | k3 k3 k3      each query head has its own copy of its group's new key and value
    made         k0       | k3            and the model's own way of sharing them

Both must put out the same, within the bound of `editing.proof`. Where no layer gets fewer heads and only bases change,
the model must put out what it did before, see `same_outputs`; each layer of which that holds must give the same by
itself, see `same_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hf_attnkit.conversion.same_attention import SameAttentions
from hf_attnkit.conversion.same_outputs import SameOutputs
from hf_attnkit.editing import projections
from hf_attnkit.editing.change import Change, MadeChange
from hf_attnkit.editing.in_table import proof_of_removal
from hf_attnkit.editing.projections import Edit
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models import known
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import discover, running_inputs
from hf_attnkit.models.layers import AttentionLayer


class TableMerge(Change):
    """A `Change` of key/value heads."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[AttentionLayer],
        edits: Sequence[Sequence[Edit]],
        heads: Sequence[tuple[int, int]],
    ) -> None:
        """
        Args:
            layers: the table's, as they are.
            edits: of each layer.
            heads: as of `Change`.

        Raises:
            ValueError: as `Change`.
        """
        super().__init__(model, [edit for own in edits for edit in own], heads)
        self._layers = list(layers)
        self._of_layers = [list(own) for own in edits]

    @contextmanager
    def made(self) -> Iterator[MadeChange]:
        """As `Change.made`.

        Raises:
            ValueError: also if the model then puts out something else than it should.
        """
        problem_now = self._proof()
        with super().made() as made:
            if problem := problem_now():
                raise ValueError(f"{problem}; the model is unchanged")
            yield made

    def _proof(self) -> Callable[[], str]:
        """A function that says what is wrong with the changed model, or nothing."""
        as_many = [
            layer
            for layer, own, (_, number) in zip(self._layers, self._of_layers, self.heads, strict=True)
            if number == layer.num_key_value_heads and any(_is_new(edit) for edit in own)
        ]
        attentions: Sequence[Attention] = ()
        if as_many:
            with known.transformers_attention(self.model):
                attentions = discover(self.model, known.probe_of(self.model)).attentions
        alike, of_model = SameAttentions(self.model, as_many, attentions), self._proof_of_model()
        return lambda: alike.difference() or of_model()

    def _proof_of_model(self) -> Callable[[], str]:
        """The same of what the whole model puts out."""
        repeated = [
            _repeated(edit, layer.head_dim)
            for layer, own in zip(self._layers, self._of_layers, strict=True)
            for edit in own
        ]
        new = projections.whole(repeated)
        if all(pair[1] == layer.num_key_value_heads for pair, layer in zip(self.heads, self._layers, strict=True)):
            inputs = running_inputs(self.model, known.probe_of(self.model))
            same = SameOutputs(self.model, inputs)
            return lambda: same.difference([edit.linear for edit in new])
        before = Undo()
        try:
            for edit in new:
                before.keep(edit.linear)
                projections.apply(edit)
            return proof_of_removal(self.model, self._layers, {}, known.probe_of(self.model)).difference
        finally:
            before.back_to()


def _is_new(edit: Edit) -> bool:
    """Whether it changes the weight."""
    return not torch.equal(edit.weight, edit.linear.weight.detach()[edit.rows])


def _repeated(edit: Edit, head_dim: int) -> Edit:
    """The same with as many heads as there are now, each new one as often as it serves."""
    if not isinstance(edit.rows, slice) or edit.rows.stop is None:
        return edit
    times = (edit.rows.stop - edit.rows.start) // len(edit.weight)
    if times == 1:
        return edit
    weight = edit.weight.unflatten(0, (-1, head_dim)).repeat_interleave(times, 0).flatten(0, 1)
    bias = edit.bias
    if bias is not None:
        bias = bias.unflatten(0, (-1, head_dim)).repeat_interleave(times, 0).flatten()
    return replace(edit, weight=weight, bias=bias)
