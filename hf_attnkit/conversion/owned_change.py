"""Merge key/value heads of a model: new weights, numbers of heads and config together, or not at all, and proven.

    1  the model is given the merged heads at full size, each repeated over its group; what it puts out then is noted
    2  all but the first of each group are cut, numbers of heads are found by running, and the result is proven:
       the smaller model puts out what the repeated heads did
    3  layers of which no head goes, and only the basis changed, must give what they did before, one by one (see
       `same_attention`), and so must the model where all are such

Everything is undone if a step fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.consistency import require_grouping
from hf_attnkit.attention.kind import ATTRIBUTE, KEPT, Stock
from hf_attnkit.conversion import heads as of_layer
from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.conversion.same_attention import SameAttentions
from hf_attnkit.conversion.same_outputs import SameOutputs
from hf_attnkit.editing import projections
from hf_attnkit.editing.cut_heads import CutHeads, cut_planned
from hf_attnkit.editing.cut_plan import CutPlan, require_own_parameters
from hf_attnkit.editing.saved_cut import require_nothing_learned_by, save_cut
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models import known
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.models.owners import Ownership

_GROUPS = "num_key_value_groups"


@dataclass(frozen=True)
class LayerMerge:
    """One layer's new heads.

    Attributes:
        layer: of `projected_layers`.
        heads: the merged ones; queries and outputs are `ABSENT` where they stay.
        constant: `(M,)` to add to the output bias, or `None`.
        groups: the present key/value heads that each new one replaces.
    """

    layer: AttentionLayer
    heads: Heads
    constant: Tensor | None
    groups: tuple[tuple[int, ...], ...]

    @property
    def group_size(self) -> int:
        return len(self.groups[0])

    @property
    def edits(self) -> list[projections.Edit]:
        """The merged heads at full size, each repeated over its group."""
        size = self.group_size
        repeated = replace(
            self.heads,
            key=self.heads.key.repeat_interleave(size, 0),
            value=self.heads.value.repeat_interleave(size, 0),
        )
        return of_layer.write(self.layer, repeated, self.constant)

    def plan(self, attention: Attention, owned: Ownership) -> CutPlan:
        """The cut: the first key/value head of each group stays. Heads of a group are next to each other by now."""
        firsts = tuple(range(0, owned.num_key_value_heads, self.group_size))
        return CutPlan(attention, owned, tuple(range(attention.num_heads)), firsts)

    def set_group_number(self, cut: CutHeads) -> None:
        """Give a module that knows no groups the attribute by which Transformers' attention functions do.

        With as many key/value heads as query heads it means what the module did without, so it may come before the cut.
        """
        if not hasattr(self.layer.module, _GROUPS) and self.layer.group_size == 1 and self.group_size > 1:
            cut.steps.set(self.layer.module, _GROUPS, 1)

    def note_group_number(self, cut: CutHeads, path: str) -> None:
        """Note it with the other numbers."""
        number = self.layer.num_heads // len(self.groups)
        if getattr(self.layer.module, _GROUPS, None) == number:
            cut.numbers[path][_GROUPS] = number


class OwnedChange:
    """New key/value heads for layers of `projected_layers`, computed and not yet made."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], merges: Sequence[LayerMerge]) -> None:
        """
        Raises:
            ValueError: for a swapped attention that has learned something for each head, or one of Transformers' that
                cannot group heads.
        """
        self.model, self._layers, self._merges = model, list(layers), list(merges)
        new = {one.layer.index: len(one.groups) for one in merges}
        self.heads = [(layer.num_heads, new.get(layer.index, layer.num_key_value_heads)) for layer in layers]
        require_nothing_learned_by([layer.attention for layer in layers])
        require_grouping(
            model, [layer.module for layer in layers], self.heads, [_running(model, layer) for layer in layers]
        )

    @contextmanager
    def made(self, *, thins: bool = False) -> Iterator[CutHeads]:
        """Change the model, then run the block; an error in either, also an interruption, puts the model back.

        Args:
            thins: as of `cut_heads`.

        Raises:
            ValueError: for parameters that another module uses too, an attention that does not run with fewer heads,
                or a model that then gives something else than it should.
        """
        model, owned = self.model, known.owned(self.model)
        found = known.discovery(model)
        by_index = list(zip(found.attentions, owned, strict=True))
        plans = {one.layer.index: one.plan(*by_index[one.layer.index]) for one in self._merges}
        require_own_parameters(model, list(plans.values()))
        before = [(each.num_heads, own.num_key_value_heads) for each, own in by_index]
        fewer = [one for one in self._merges if one.group_size > 1]
        as_before = None if fewer else SameOutputs(model, found.inputs)
        alike = SameAttentions(model, [one.layer for one in self._merges if one.group_size == 1], found.attentions)
        cut = CutHeads(steps=Undo(thins=thins))
        try:
            for layer in self._layers:  # a refit gives all of them new parameters
                for module in (layer.output, layer.query):
                    if module is not None:
                        cut.steps.keep(module)
                if KEPT in layer.module.__dict__:  # learned by a kind that ran before, for heads in another basis
                    cut.steps.drop(layer.module, KEPT)
            changed: list[nn.Module] = []
            for one in self._merges:  # one after the other: their weights at full size are large
                for edit in projections.whole(one.edits):
                    cut.steps.keep(edit.linear)
                    projections.apply(edit)
                    changed.append(edit.linear)
            problem = alike.difference()
            if not problem and as_before is not None:
                problem = as_before.difference(changed)
            if problem:
                raise ValueError(
                    f"{problem}, though heads got another basis and nothing else: give method='mean', which leaves "
                    "bases as they are; the model is unchanged"
                )
            for one in fewer:
                one.set_group_number(cut)
            if fewer:
                cut_planned(model, [plans[one.layer.index] for one in fewer], found, cut)
                for one in fewer:
                    one.note_group_number(cut, found.attentions[one.layer.index].path)
                save_cut(model, found, owned, cut, before)
            yield cut
        except BaseException:
            cut.undo()
            raise


def _running(model: PreTrainedModel, layer: AttentionLayer) -> str:
    """Name of the attention that a layer runs."""
    config = getattr(layer.module, "config", model.config)
    return str(getattr(layer.module, ATTRIBUTE, Stock(config._attn_implementation)).name)


def trial(model: PreTrainedModel, layers: Sequence[AttentionLayer], numbers: Sequence[int]) -> None:
    """Cut to these numbers of key/value heads, and undo it: so that a long calibration is not in vain.

    Raises:
        ValueError: as `OwnedChange.made`.
    """
    merges = []
    for layer, number in zip(layers, numbers, strict=True):
        if number == layer.num_key_value_heads:
            continue
        size = layer.num_key_value_heads // number
        present = of_layer.read(layer)
        firsts = replace(present, query=ABSENT, output=ABSENT, key=present.key[::size], value=present.value[::size])
        groups = tuple(tuple(range(start, start + size)) for start in range(0, layer.num_key_value_heads, size))
        merges.append(LayerMerge(layer, firsts, None, groups))
    if merges:
        with OwnedChange(model, layers, merges).made() as made:
            made.undo()
