"""How heads are merged: a method for values, one for keys, and the grouping. Checked once, here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_attnkit.common.checks import choice
from hf_attnkit.conversion import grouping as groupings
from hf_attnkit.conversion.grouping import GROUPINGS, Grouping
from hf_attnkit.conversion.heads import Heads
from hf_attnkit.conversion.methods.table import METHODS, Merged, group_loss, merge, transforms, uses_statistics
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Merging:
    """
    Attributes:
        method: of `METHODS`, for the values.
        key_method: for the keys.
        grouping: "adjacent" heads are merged, or "best", those that lose least together.
    """

    method: str
    key_method: str
    grouping: str = "adjacent"

    def __post_init__(self) -> None:
        for argument, name in (("method", self.method), ("key_method", self.key_method)):
            if name not in METHODS:
                raise ValueError(f"unknown {argument} {name!r}; available: {', '.join(METHODS)}")
        choice(self.grouping, "grouping", GROUPINGS)
        if self.grouping == "best" and "random" in (self.method, self.key_method):
            raise ValueError(
                "grouping='best' looks for the least loss, and method 'random' does not aim at one; leave it out"
            )

    @property
    def uses_statistics(self) -> bool:
        """Whether a method looks at the inputs' second moments; it then also changes bases where no head goes."""
        return uses_statistics(self.method) or uses_statistics(self.key_method)

    def check(self, layers: Sequence[AttentionLayer]) -> None:
        """Raise `ValueError` if the layers' heads cannot be merged in this way."""
        if empty := [layer.index for layer in layers if layer.is_empty]:
            raise ValueError(
                f"layers {empty} have no heads left, so there are none to merge; convert first, and remove all heads "
                "of a layer after"
            )
        if all(layer.refusal for layer in layers):
            raise ValueError(
                f"{layers[0].name}: key/value heads cannot be merged, by any method and grouping: {layers[0].refusal}; "
                "its heads can be scored and removed (prune_heads)"
            )
        normed = _normed(layers)
        if normed is not None and transforms(self.key_method):
            names = ", ".join(name for name in METHODS if not transforms(name))
            raise ValueError(
                f"method {self.key_method!r} gives keys another basis, but {normed.norm} of layer {normed.index} is "
                f"between the key projection and the scores and would not follow; give key_method, one of {names}: "
                f"values are then still merged by method={self.method!r}"
            )
        bound = next((layer for layer in layers if layer.between_values), None)
        if bound is not None and transforms(self.method):
            names = ", ".join(name for name in METHODS if not transforms(name))
            raise ValueError(
                f"method {self.method!r} gives values another basis, but {bound.between_values} of {bound.name} is "
                f"between values and output projection and would not follow; give method, one of {names}"
            )
        if self.grouping == "best" and (apart := next((each for each in layers if each.permuted_apart), None)):
            raise ValueError(
                f"grouping='best' puts heads in another order, which {apart.permuted_apart} of {apart.name} would not "
                "follow; leave it out"
            )

    def check_numbers(self, layers: Sequence[AttentionLayer], numbers: Sequence[int]) -> None:
        """Raise `ValueError` if a layer that is to get fewer heads has projections that cannot be merged so."""
        needed = ["key", "value"]
        if transforms(self.key_method) or self.grouping == "best":
            needed.append("query")
        for layer, number in zip(layers, numbers, strict=True):
            if number == layer.num_key_value_heads:
                continue
            for role in needed:
                if role in layer.problems:
                    keep = f"; a list as num_key_value_heads may keep its {layer.num_key_value_heads}"
                    remedy = "; give key_method='mean' and leave grouping out" if role == "query" else keep
                    what = "cannot get another basis or order" if role == "query" else "cannot be merged"
                    raise ValueError(f"{layer.name}: its {role} heads {what}: {layer.problems[role]}{remedy}")
            if (transforms(self.method) or self.grouping == "best") and layer.output is None:
                raise ValueError(
                    f"{layer.name}: no matrix product takes its heads' outputs, so values cannot get another basis or "
                    "order; give method='mean' and leave grouping out"
                )

    def changes(self, layer: AttentionLayer, number: int) -> bool:
        """Whether a layer of `projected_layers` changes: fewer heads, or other bases."""
        if number < layer.num_key_value_heads:
            return True
        return self.uses_statistics and not layer.problems and layer.output is not None

    def check_tokens(self, layers: Sequence[AttentionLayer], numbers: Sequence[int], num_tokens: int | None) -> None:
        """Raise `ValueError` if statistics are of too few tokens for these numbers of heads; `None`: of none."""
        if num_tokens is None or not self.uses_statistics:
            return
        for layer, number in zip(layers, numbers, strict=True):
            needed = layer.num_key_value_heads // number * layer.head_dim
            if num_tokens < needed and not layer.problems:
                raise ValueError(
                    f"{num_tokens} calibration tokens are too few: layer {layer.index} merges heads of {needed} "
                    f"components together, whose second moment needs at least as many tokens; give more, or none"
                )

    def groups(self, heads: Heads, number: int, second_moment: Tensor) -> Grouping:
        """Which of a layer's key/value heads each of `number` new ones replaces."""
        if self.grouping == "adjacent":
            return groupings.adjacent(len(heads.key), number)
        return groupings.best(len(heads.key), number, group_loss(heads, second_moment, self.method, self.key_method))

    def merge(self, heads: Heads, groups: Grouping, second_moment: Tensor) -> Merged:
        """One new head for each group."""
        return merge(heads, groups, second_moment, self.method, self.key_method)

    def loss(self, heads: Heads, number: int, second_moment: Tensor) -> float:
        """Predicted loss of merging a layer's heads into `number`, keys and values added; 0 where nothing is merged."""
        if number == len(heads.key):
            return 0.0
        merged = self.merge(heads, self.groups(heads, number, second_moment), second_moment)
        return merged.key_loss + merged.value_loss


def choose_merging(
    layers: Sequence[AttentionLayer],
    method: str | None,
    key_method: str | None,
    grouping: str | None = None,
    *,
    calibrated: bool,
    has_batches: bool = False,
) -> Merging:
    """The merging that is asked for, with defaults in place of `None`.

    Without `method`: "pca" where there are calibration data, else "mean". The keys are then merged by "mean" where a
    norm follows their projection (Qwen3), or queries are no plain rows, since that forbids "pca", and so are values and
    keys where something is between values and output projection.

    Without `grouping`: "best" where there are batches, keys and values are merged by "pca", which knows what any group
    loses from one matrix, and no layer has more heads than a search goes through in little time. Else "adjacent", as in
    checkpoints that are converted shard by shard, which have statistics and no batches.

    Raises:
        ValueError: for names that do not exist or do not fit the layers.
    """
    bound = any(layer.between_values for layer in layers)
    chosen = method if method is not None else "pca" if calibrated and not bound else "mean"
    if key_method is None:
        fixed = _normed(layers) is not None or any("query" in layer.problems for layer in layers)
        key_method = "mean" if method is None and fixed else chosen
    if grouping is None:
        few = all(layer.num_key_value_heads <= groupings.MOST_HEADS and not layer.permuted_apart for layer in layers)
        grouping = "best" if has_batches and few and chosen == key_method == "pca" else "adjacent"
    merging = Merging(chosen, key_method, grouping)
    merging.check(layers)
    return merging


def _normed(layers: Sequence[AttentionLayer]) -> AttentionLayer | None:
    """The first layer with a norm between key projection and scores."""
    return next((layer for layer in layers if layer.norm), None)
