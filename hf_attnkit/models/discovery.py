"""A model says by itself which modules attend, in which order and how: it is run on a few tokens and watched.

The model runs what it runs anyway, twice: the first pass sees the calls of the attention interface, the second what
the attending modules are given and which module takes what they put out. Both must give the same, bit for bit, else
nothing that is later proven on this model would mean anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode, full_precision
from hf_attnkit.models.attention import Attention, Inputs, is_linear
from hf_attnkit.models.bypass import bypassing_attentions
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.sample_inputs import input_device, sample_inputs
from hf_attnkit.models.shared_bias import with_shared_bias
from hf_attnkit.models.tensors import cloned, first_difference, tensors_in, without_caches
from hf_attnkit.models.token_ids import require_known_tokens


@dataclass(frozen=True)
class Discovery:
    """What a model was seen to do.

    Attributes:
        attentions: in calling order, cross-attention after all others, as the layers of an encoder-decoder are
            numbered; a module called several times is one.
        inputs: under which the model ran.
        not_run: paths of models inside this one that the inputs did not reach.
    """

    attentions: tuple[Attention, ...]
    inputs: dict[str, Any] = field(repr=False)
    not_run: tuple[str, ...] = ()


def discover(model: PreTrainedModel, probe: Mapping[str, Any] | None = None) -> Discovery:
    """Run a model on a few tokens, an image or features, and say which modules attend, in which order and how.

    The model is as it was afterwards: weights, config, attention implementation, modes, hooks, random state.

    Args:
        probe: inputs for `model(**probe)`; by default made from what its forward takes.

    Raises:
        TypeError: if `model` is no `PreTrainedModel`.
        ValueError: for weights that are on the meta device, inputs that cannot be made or do not run, a
            model without attention, or one whose forward pass differs from run to run.
    """
    require_weights(model)
    with quiet(model):
        inputs, calls, before = _first_run(model, probe)
        found, after, not_run = _second_run(model, inputs, calls)
        found += bypassing_attentions(model, inputs, [each.module for each in found], len(found))
        found = with_shared_bias(model, inputs, _numbered(found))
    if (differs := first_difference(before, after)) is not None:
        raise ValueError(
            f"{type(model).__name__} gives other outputs when it runs again on the same inputs, in evaluation mode: "
            f"output {differs[0]} differs by {differs[1]:.1e}; nothing can be proven on it. Turn off what it draws at "
            "random (masking, sampling, noise) in its config"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention: none of its modules calls Transformers' attention interface, "
            "and none that says how many heads it has takes a softmax in front of a matrix product"
        )
    return Discovery(tuple(found), inputs, not_run)


def _numbered(found: Sequence[Attention]) -> list[Attention]:
    """In calling order, cross-attention after all others, with the place in calling order."""
    ordered = sorted((replace(each, order=order) for order, each in enumerate(found)), key=lambda each: each.is_cross)
    return [replace(each, index=index) for index, each in enumerate(ordered)]


def require_weights(model: PreTrainedModel) -> None:
    """Raise `TypeError` or `ValueError` for a model that cannot run: no model, or without weights.

    Those that an offloading hook brings in when a module runs are there.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers.PreTrainedModel, got {type(model).__name__}; pass the model itself, before "
            "torch.compile, accelerator.prepare or another wrapper"
        )
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and not (hasattr(module, "_hf_hook") and input_device(model).type != "meta"):
                raise ValueError(
                    f"{type(model).__name__}: {path}.{name} is on the meta device, so the model cannot run; load its "
                    "weights first (from_pretrained with a device_map that does not offload)"
                )


def require_gradients(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that PyTorch lets no gradient through."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{type(model).__name__}: {name} was made in inference mode, and what needs a gradient cannot use it; "
                "load the model outside of torch.inference_mode()"
            )


def is_spread(parameter: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes them."""
    return type(parameter).__module__.startswith("torch.distributed")


def require_runnable(model: PreTrainedModel) -> None:
    """Raise `TypeError` or `ValueError` for a model whose heads cannot be told: as `require_weights`, and quantized."""
    require_weights(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{type(model).__name__}: {name} is offloaded, so what belongs to a head cannot be told; load it with "
                "a device_map that does not offload"
            )
        if is_spread(parameter):
            raise ValueError(
                f"{type(model).__name__}: {name} is a {type(parameter).__name__}, spread over devices, so rows cannot "
                "be cut out of it; change the model first and spread it then (without FSDP)"
            )
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise ValueError(
                f"{type(model).__name__}: {name} is quantized ({parameter.dtype}), so what belongs to a head cannot "
                "be told; load the model without quantization (for GGUF: gguf_file=..., which dequantizes)"
            )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is quantized; load it without quantization to look at its heads")


# On a CPU, bitsandbytes lays 4-bit weights out for inference when a module that has this first runs in evaluation mode:
# they could not train from then on, and small ones do not run.
_PACKS = "support_avx512bf16_for_cpu"


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run the model for a while in evaluation mode, without gradients or autocast, in the precision of its dtype.

    Modes and random state come back.
    """
    device = input_device(model)
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(full_precision())
        for module in model.modules() if getattr(model, "is_quantized", False) else ():
            if module.__dict__.get(_PACKS):
                setattr(module, _PACKS, False)
                stack.callback(setattr, module, _PACKS, True)
        yield


def run_outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors of floating point that the model puts out, caches left out."""
    return tensors_in(model(**cloned(dict(inputs))))


def _first_run(
    model: PreTrainedModel, probe: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[Call], list[Tensor]]:
    """The first inputs that run, the calls they lead to, and the outputs."""
    if probe is not None and not isinstance(probe, Mapping):
        raise ValueError(f"probe must be a mapping of model inputs, got {type(probe).__name__}")
    if probe is not None:
        require_known_tokens(model, probe)
    device = input_device(model)
    given = None if probe is None else {k: v.to(device) if isinstance(v, Tensor) else v for k, v in probe.items()}
    reasons: list[str] = []
    attempts = sample_inputs(model) if given is None else iter([given])
    while True:
        calls: list[Call] = []

        def watch(call: Call, calls: list[Call] = calls) -> tuple[Tensor, Any]:
            calls.append(call)
            return call.run()

        try:
            inputs = next(attempts)
            with watched(model.modules(), watch):
                return inputs, calls, run_outputs(model, inputs)
        except StopIteration:
            break
        except Exception as error:  # whatever a model's code raises says that these are not its inputs
            reasons.append(f"{type(error).__name__}: {str(error)[:200]}")
            if given is not None:
                raise ValueError(
                    f"{type(model).__name__} does not run on the probe {list(given)}: {reasons[0]}"
                ) from error
    require_runnable(model)  # for quantized weights on a device that cannot multiply them
    raise ValueError(
        f"no inputs could be made for {type(model).__name__}, whose forward takes {_arguments(model)}; give them "
        f"by hf_attnkit.set_probe(model, {{...}}), or as probe={{...}} to describe_attention. Tried, and it failed "
        f"with: {'; '.join(reasons) or 'nothing'}"
    )


def _arguments(model: PreTrainedModel) -> str:
    import inspect

    return ", ".join(name for name in inspect.signature(model.forward).parameters if name not in ("kwargs", "args"))


def _second_run(
    model: PreTrainedModel, inputs: dict[str, Any], calls: Sequence[Call]
) -> tuple[list[Attention], list[Tensor], tuple[str, ...]]:
    """The attentions, with what each module was given and which module took its output; and the outputs."""
    paths = {id(module): path for path, module in model.named_modules()}
    modules = list({id(call.module): call.module for call in calls}.values())
    given: dict[int, Inputs] = {}
    runs: dict[int, int] = dict.fromkeys(map(id, modules), 0)
    outputs: dict[int, str] = {}
    waiting: list[tuple[int, Tensor]] = []
    reached: set[str] = set()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runs[id(module)] += 1
        given.setdefault(id(module), (without_caches(args), without_caches(kwargs)))

    def watch(call: Call) -> tuple[Tensor, Any]:
        output, weights = call.run()
        waiting.append((id(call.module), output.flatten(2)))
        return output, weights

    def take(module: nn.Module, args: tuple[Any, ...]) -> None:
        taken = args[0] if args and isinstance(args[0], Tensor) else None
        for owner, output in waiting if taken is not None else ():
            if (
                owner not in outputs
                and taken.shape[-1] == output.shape[-1]  # type: ignore[union-attr]
                and taken.numel() == output.numel()  # type: ignore[union-attr]
                and torch.equal(taken.reshape(output.shape), output)  # type: ignore[union-attr]
            ):
                outputs[owner] = paths[id(module)]
                waiting.clear()
                return

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for path, module in model.named_modules():
            if is_linear(module):
                stack.callback(module.register_forward_pre_hook(take).remove)
            if isinstance(module, PreTrainedModel) and path:
                stack.callback(module.register_forward_pre_hook(lambda _, __, path=path: reached.add(path)).remove)
        stack.enter_context(watched(modules, watch))
        after = run_outputs(model, inputs)
    inner = [path for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)]
    not_run = tuple(path for path in inner if path not in reached and _attends_nowhere(path, modules, paths))
    found = []
    for index, module in enumerate(modules):
        own = [call for call in calls if call.module is module]
        attention = _describe(index, paths[id(module)], own[0], given.get(id(module), ((), {})))
        count = max(1, runs[id(module)])
        found.append(
            replace(attention, calls=count, calls_per_forward=len(own) // count, output=outputs.get(id(module)))
        )
    return found, after, not_run


def _attends_nowhere(path: str, modules: Sequence[nn.Module], paths: Mapping[int, str]) -> bool:
    return not any(paths[id(module)].startswith(f"{path}.") for module in modules)


def _describe(index: int, path: str, call: Call, inputs: Inputs) -> Attention:
    """How one call attends."""
    keywords, module = call.keywords, call.module
    given = {name for name, value in keywords.items() if value is not None}
    others = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
    bias = keywords.get("position_bias")
    bias = bias if isinstance(bias, Tensor) else call.mask
    window = keywords.get("sliding_window")
    return Attention(
        index,
        path,
        module,
        num_heads=call.query.shape[1],
        num_key_value_heads=call.key.shape[1],
        head_dim=call.query.shape[-1],
        value_head_dim=call.value.shape[-1],
        is_causal=_is_causal(call),
        is_cross=call.query.shape[2] != call.key.shape[2]
        or any(isinstance(inputs[1].get(name), Tensor) for name in others),
        window=window if isinstance(window, int) and not isinstance(window, bool) else None,
        softcap=keywords.get("softcap"),
        has_sinks=isinstance(keywords.get("s_aux"), Tensor),
        position_bias=isinstance(bias, Tensor) and bias.dim() == 4 and bias.shape[1] > 1,
        dropout=_dropout(module),
        keywords=tuple(sorted(given)),
        lengths=(call.query.shape[2], call.key.shape[2]),
        inputs=inputs,
    )


def _is_causal(call: Call) -> bool:
    """Whether no query sees a later key: as the mask says, and without one as the flags say."""
    numeric = isinstance(call.mask, Tensor) and (call.mask.dtype == torch.bool or call.mask.is_floating_point())
    if numeric and call.mask.dim() == 4:  # a swapped attention's mask is in code
        hidden = ~call.mask if call.mask.dtype == torch.bool else call.mask <= torch.finfo(call.mask.dtype).min / 2
        later = torch.ones_like(hidden[0, 0]).triu(1)
        return call.query.shape[2] == call.key.shape[2] > 1 and bool(hidden[-1, :, later].all())
    flag = call.keywords.get("is_causal")
    flag = getattr(call.module, "is_causal", False) if flag is None else flag
    return bool(flag) and call.query.shape[2] > 1


def _dropout(module: nn.Module) -> float:
    """What the module calls its dropout of attention weights, which it passes on in training only."""
    for name in ("attention_dropout", "attn_dropout", "dropout_prob", "dropout", "attention_probs_dropout_prob"):
        value = getattr(module, name, None)
        value = value.p if isinstance(value, nn.Dropout) else value
        if isinstance(value, float):
            return value
    return 0.0
