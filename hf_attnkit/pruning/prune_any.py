"""Remove heads from a model whose heads are found by running it: `cut_heads`, and a record of what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from hf_attnkit.attention.consistency import require_consistent, require_unnamed_heads
from hf_attnkit.common.checks import in_range
from hf_attnkit.editing.cut_heads import cut_heads
from hf_attnkit.editing.last_change import record_change
from hf_attnkit.editing.saved_cut import cache_bytes_of, require_nothing_learned_by, save_cut
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.known import probe_of, require_runnable, transformers_attention
from hf_attnkit.models.layers import attention_layers, discovered_layers, require_parameters, require_plain
from hf_attnkit.models.ownership import ownerships
from hf_attnkit.models.without_heads import has_no_heads
from hf_attnkit.pruning.report import PruningReport
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.refit import refit_layers

Heads = Mapping[Any, Iterable[int]]
NONE = RefitOptions("none")


def prune_discovered(
    model: PreTrainedModel,
    heads: Heads,
    probe: Mapping[str, Any] | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    refit: RefitOptions = NONE,
) -> PreTrainedModel:
    """Remove heads, by an attention's number in calling order or its path; as `prune_heads`.

    Args:
        batches: of the refit.
        refit: of "output", "scale" or "none".

    Raises:
        TypeError, ValueError: as `prune_heads`; the model is then unchanged.
    """
    require_plain(model)
    require_runnable(model)
    layers = attention_layers(model)
    require_consistent(model, layers)
    with transformers_attention(model):
        found = discover(model, probe_of(model) if probe is None else probe)
    removed = by_index(heads, found.attentions)
    if not removed:
        raise ValueError("no head to remove: heads is empty")
    for index, given in removed.items():
        if has_no_heads(found.attentions[index].module):
            raise ValueError(f"layer {index} has no heads left, so {given} cannot be removed; leave the layer out")
    pruned = [layer for layer in layers if layer.index in removed]
    require_unnamed_heads(pruned)
    require_parameters(pruned)
    require_nothing_learned_by([found.attentions[index] for index in removed])
    with transformers_attention(model):
        owned = ownerships(model, found.attentions)
    before = [
        (0, 0) if has_no_heads(each.module) else (each.num_heads, own.num_key_value_heads)
        for each, own in zip(found.attentions, owned, strict=True)
    ]
    cut = cut_heads(model, removed, found, owned, thins=refit.fits == "none")
    try:
        save_cut(model, found, owned, cut, before)
        reached = None
        if refit.fits != "none":
            layers = discovered_layers(model)
            for layer in layers:
                if layer.output is not None:
                    cut.steps.keep(layer.output)
            reached = refit_layers(model, layers, cut, batches, refit, stream=True)
    except BaseException:
        cut.undo()
        raise
    after = [cut.heads.get(index, pair) for index, pair in enumerate(before)]
    gone = {index: tuple(sorted(map(int, heads))) for index, heads in sorted(removed.items())}
    size = model.dtype.itemsize
    record_change(
        model,
        PruningReport(
            tuple(before), tuple(after), gone, reached,
            cache_bytes_of(found, before, size), cache_bytes_of(found, after, size),
        ),
    )  # fmt: skip
    return model


def by_index(heads: Heads, attentions: Sequence[Attention]) -> dict[int, list[int]]:
    """`{attention: [head, ...]}` by number, attentions without a head left out.

    Raises:
        TypeError, ValueError: for anything else than a mapping of attentions, each named once, to heads.
    """
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads={heads!r} must be a mapping {{attention: [head, ...]}}")
    paths = {each.path: each.index for each in attentions}
    found: dict[int, list[int]] = {}
    for key, given in heads.items():
        if isinstance(key, str) and key not in paths:
            raise ValueError(f"no attention has the path {key!r}; there are {', '.join(paths)}")
        index = paths[key] if isinstance(key, str) else in_range(key, len(attentions), "layer")
        if index in found:
            raise ValueError(f"layer {index} ({attentions[index].path}) is named twice, by number and by path")
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"layer {index}: {given!r} must be a list of heads")
        found[index] = list(given)
    return {index: given for index, given in found.items() if given}
