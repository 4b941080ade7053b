"""Proof of a swap, on the model itself: what each layer now gives is what plain softmax gives under its pattern.

The swapped model runs on a few tokens with a padded row. Then it runs again as Transformers has it, with Transformers'
own masks, and at each attention call the same queries, keys and values go through Transformers' function:

    exact kinds        Transformers' function as the model calls it
    patterns           the same with the pattern, as `Kind.seen` gives it, in its mask as a matrix
    linear             no equal: that it was called

The second run continues with the first run's output of each call, so that nothing is compared that differs by more
than the rounding of one attention, and what the models put out in the end must be the same again. An output is a mean
of values, whose weights change by a rounding of the scores s:

    | ours - theirs |  <=  16 * eps * (1 + max |s|) * max |v|

In 16 bits this would see gross faults only, so there each call is compared in float32 too. Queries that see no key,
and those that are padding, are left out: what comes of them is read by nobody, and implementations differ there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.attention import kind as kinds_module
from hf_attnkit.attention.cache import CACHE_ARGUMENT
from hf_attnkit.attention.consistency import bases
from hf_attnkit.attention.dispatch import attention_forward
from hf_attnkit.attention.kind import ATTRIBUTE, PARAMETERS, ROTATION, Kind
from hf_attnkit.attention.mask import HIDES, Mask
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models import known
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.models.sample_inputs import input_device
from hf_attnkit.models.tensors import cloned, mapped, tensors_in

FACTOR = 16


@dataclass
class _Seen:
    """One call of the swapped model: what it took and gave, and what its kind gives in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    exact: Tensor | None


def prove_swap(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], swapped: Sequence[AttentionLayer]
) -> dict[str, Any]:
    """Prove that the model, as it is now, computes in each layer what that layer's kind says.

    Args:
        layers: all of the model.
        swapped: those that must have been called.

    Returns:
        The inputs under which it ran.

    Raises:
        ValueError: if one was not called, gives something else, or the model does not run.
    """
    if input_device(model).type == "meta":
        raise ValueError(
            "the model is on the meta device, so the swap cannot be proved by running it; load the weights first "
            "(hf_attnkit.load_pretrained builds a swapped checkpoint on its devices)"
        )
    inputs = known.known(model).discovery.inputs
    modules = [layer.module for layer in layers if not layer.refusal]
    names = {id(layer.module): layer.name for layer in layers}
    with quiet(model), evaluation_mode(model):
        seen, outputs = _swapped_run(model, layers, modules, swapped, inputs)
        problems: list[str] = []

        def compare(call: Call) -> tuple[Tensor, Any]:
            calls = seen.get(id(call.module))
            if not calls:
                problems.append(f"{names[id(call.module)]} is called more often than when it is swapped")
                return call.run()
            one = calls.pop(0)
            if problem := _difference(call, one):
                problems.append(f"{names[id(call.module)]} {problem}")
            return one.output, None

        with known.transformers_attention(model, preferred=bases(model)), watched(modules, compare):
            again = _run(model, inputs)
    if not problems and any(seen.values()):
        late = [names[number] for number, calls in seen.items() if calls]
        problems.append(f"{', '.join(late)}: called less often by the model as Transformers runs it")
    if not problems:
        problems += _other_outputs(outputs, again)
    if problems:
        raise ValueError(
            f"the swapped {type(model).__name__} is not what it should be: {problems[0]}; the model is unchanged. "
            "Where Transformers' own implementation of this model is at fault, load it with another attn_implementation"
        )
    return inputs


def _swapped_run(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    modules: Sequence[Any],
    swapped: Sequence[AttentionLayer],
    inputs: Mapping[str, Any],
) -> tuple[dict[int, list[_Seen]], list[Tensor]]:
    """The calls that a run leads to, which must reach all layers to be swapped, and its outputs."""
    seen: dict[int, list[_Seen]] = {}

    def note(call: Call) -> tuple[Tensor, Any]:
        if call.function.__name__ != attention_forward.__name__:
            return call.run()  # Transformers' function, which a layer that keeps it runs inside of ours
        exact = None
        if call.query.dtype.itemsize == 2 and CACHE_ARGUMENT not in call.keywords:
            exact, _ = _in_float32(call).run()
        query, key, value = call.query, call.key, call.value
        output, weights = call.run()
        seen.setdefault(id(call.module), []).append(_Seen(query, key, value, output, exact))
        return output, weights

    try:
        with watched(modules, note):
            outputs = _run(model, inputs)
    except ValueError:
        raise
    except Exception as error:  # whatever a model's code raises
        others = [layer.name for layer in layers if layer.refusal]
        why = (
            f". {others[0]} and what else never calls Transformers' attention interface ({len(others)} attentions) "
            "gets the mask of a swapped model too, which has another form, and cannot read it"
            if others
            else ""
        )
        raise ValueError(
            f"{type(model).__name__} does not run with the new attention: {type(error).__name__}: {str(error)[:200]}"
            f"{why}; the model is unchanged"
        ) from error
    if missing := [layer.index for layer in swapped if id(layer.module) not in seen]:
        raise ValueError(
            f"layers {missing} of {type(model).__name__} never called the attention interface, so swapping it has no "
            "effect on them; the model is unchanged"
        )
    return seen, outputs


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    return tensors_in(model(**cloned(dict(inputs))))


def _in_float32(call: Call) -> Call:
    def up(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    return replace(
        call, query=up(call.query), key=up(call.key), value=up(call.value), mask=mapped(call.mask, up),
        keywords=mapped(dict(call.keywords), up),
    )  # fmt: skip


def _difference(call: Call, one: _Seen) -> str:
    """What is wrong with the output of a call, or nothing; `call` is of the model as Transformers runs it."""
    if [x.shape for x in (call.query, call.key, call.value)] != [x.shape for x in (one.query, one.key, one.value)]:
        return f"gets {tuple(call.query.shape)} queries and {tuple(call.key.shape)} keys where Transformers runs it"
    call = replace(call, query=one.query, key=one.key, value=one.value)
    kind = getattr(call.module, ATTRIBUTE)
    if isinstance(kind, Kind) and not kind.forms_scores:
        return ""
    pairs = [(call, one.output)] if one.exact is None else [(_in_float32(call), one.exact), (call, one.output)]
    for each, ours in pairs:
        mask, pattern = _masks(each, kind)
        theirs = _plainly(each, kind, mask, pattern)
        off = (ours.double() - theirs.double()).abs()
        counts = _counts(mask, pattern)
        off = off if counts is None else off.masked_fill(~counts, 0.0)
        bound = rounding_bound(each)
        if not bool((off <= bound).all()):
            what = "plain softmax" if pattern is None else "plain softmax under its pattern as a matrix"
            return (
                f"runs {kind.name!r} and differs from {what} by {float(off.max()):.1e}, more than the {bound:.1e} that "
                "rounding explains"
            )
    return ""


def _plainly(call: Call, kind: Any, mask: Mask, pattern: Mask | None) -> Tensor:
    """What plain softmax gives; where positions are counted otherwise, the kind's one expression."""
    if not getattr(kind, "renumber", False):
        return (call if pattern is None else _under(call, pattern)).run()[0]
    scaling = call.keywords.get("scaling") or call.query.shape[-1] ** -0.5
    rotation = getattr(call.module, ROTATION)
    with_rotation = kinds_module.Call(num_heads=call.query.shape[1], rotation=rotation)
    output: Tensor = kind.of_any_length(call.query, call.key, call.value, mask, scaling=scaling, call=with_rotation)
    return output.transpose(1, 2)


def _counts(mask: Mask, pattern: Mask | None) -> Tensor | None:
    """Which queries count, bool `(B or 1, Q, H or 1, 1)`: those that see a key, and are no padding themselves."""
    visible, stock = (each.as_matrix().visible() for each in (mask if pattern is None else pattern, mask))
    if visible is None:
        return None
    counts = visible.any(-1)
    if stock is not None and mask.query_position.shape[1] == mask.key_position.shape[1]:
        own = stock.expand(-1, -1, stock.shape[-1], -1).diagonal(dim1=-2, dim2=-1)
        counts = counts & own
    return counts.transpose(1, 2)[..., None]


def _masks(call: Call, kind: Any) -> tuple[Mask, Mask | None]:
    """What Transformers' mask shows, and what of it the kind sees; `None` for all of it."""
    is_causal = call.keywords.get("is_causal")
    is_causal = getattr(call.module, "is_causal", True) if is_causal is None else is_causal
    mask = Mask.receive(
        call.mask, call.query.shape[2], call.key.shape[2], is_causal=bool(is_causal), device=call.query.device
    )
    if not isinstance(kind, Kind):
        return mask, None
    given = {name: call.keywords[name] for name in kind.call_arguments if name in call.keywords}
    parameters = getattr(call.module, PARAMETERS, None)
    seen = kind.seen(mask, call.key.shape, kinds_module.Call(None, parameters, given, call.query.shape[1]))
    return mask, None if seen is mask else seen


def _under(call: Call, pattern: Mask) -> Call:
    """The same call with this pattern as its mask, a matrix in the form that the function takes."""
    matrix: Any = pattern.as_matrix().visible()
    assert matrix is not None
    dtype = call.query.dtype
    if pattern.bias is not None:
        matrix = pattern.bias.masked_fill(~matrix, torch.finfo(pattern.bias.dtype).min)
    elif inspect.isfunction(call.function) and "sdpa" not in call.function.__name__:
        matrix = torch.zeros_like(matrix, dtype=dtype).masked_fill(~matrix, torch.finfo(dtype).min)
    return replace(call, mask=matrix, keywords=call.keywords | {"is_causal": False})


def rounding_bound(call: Call) -> float:
    group = call.query.shape[1] // call.key.shape[1]
    scaling = call.keywords.get("scaling")
    scaling = call.query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = call.key.float().repeat_interleave(group, 1)
    scores = (call.query.float() @ keys.transpose(-1, -2)).abs().max() * scaling
    bias = call.mask if isinstance(call.mask, Tensor) and call.mask.is_floating_point() else None
    bias = call.keywords.get("position_bias") if bias is None else bias
    if isinstance(bias, Tensor):
        scores = scores + bias.float().masked_fill(bias <= HIDES, 0.0).abs().max()
    return FACTOR * torch.finfo(call.query.dtype).eps * (1 + float(scores)) * float(call.value.float().abs().max())


def _other_outputs(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[str]:
    """What the models put out after the same attention; a sum may be in another order on some devices."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            return [f"output {index} has the shape {tuple(a.shape)} and not {tuple(b.shape)}"]
        off = size = 0.0
        for parts in zip(*(x.flatten().split(2**18) for x in (a, b)), strict=True):  # in float64 logits are large
            x, y = (part.double().nan_to_num(0.0, 0.0, 0.0) for part in parts)
            if y.numel():
                off, size = max(off, float((x - y).abs().max())), max(size, float(y.abs().max()))
        if off > 2**10 * torch.finfo(ours[index].dtype).eps * size:
            return [f"output {index} differs by {off:.1e} though each attention gives the same: it depends on the name"]
    return []
