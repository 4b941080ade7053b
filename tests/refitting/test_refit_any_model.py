"""The refit of models whose heads are found by running: what is walked, what is fitted, and to what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.any_model import UnseenConfig, UnseenModel, any_model
from support.calibrated import batches_for, divergence, lively, logits
from support.refits import plain
from support.unchanged import unchanged
from torch import Tensor, nn

from hf_attnkit import convert_to_gqa, last_change, prune_heads
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.layers import discovered_layers, in_running_order, projected_layers
from hf_attnkit.models.ownership import ownerships
from hf_attnkit.models.tensors import tensors_in
from hf_attnkit.observing.walk import Walk, can_skip
from hf_attnkit.refitting.outputs import OutputSums, solve
from hf_attnkit.refitting.queries import can_fit_queries

WALKED = ("gpt2", "opt", "gpt_neox", "gemma2", "mixtral", "modernbert", "bart", "whisper", "deberta-v2", "falcon",
          "lfm2", "never seen")  # fmt: skip
# Of some something is done to the attention's output before it is added: a norm, a factor.
WITHOUT_STREAM = ("gemma2", "granite")


def outputs_of(model: Any, layers: Any, inputs: Any) -> dict[int, tuple[list[Tensor], list[Tensor]]]:
    """What each output projection takes and puts out in one whole forward pass, all calls."""
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer.index: ([], []) for layer in layers}

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[index][0].append(args[0].clone())
            found[index][1].append(output.clone())

        return hook

    handles = [layer.output.register_forward_hook(note(layer.index)) for layer in layers]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", [*WALKED, "albert"])
def test_walking_gives_what_a_whole_forward_pass_gives(model_type: str) -> None:
    model = lively(model_type)
    layers, inputs = in_running_order(discovered_layers(model)), batches_for(model, 1)[0]
    want = outputs_of(model, layers, inputs)
    with unchanged(model):
        skips = can_skip(model, layers, inputs)
        assert skips == (model_type != "albert")
        walk = Walk(model, inputs, layers, skips=skips)
        for layer in layers:
            for stream in (False, True, False):
                seen = walk.seen(layer.index, layer.output, stream=stream)
                for got, expected in zip(seen[:2], want[layer.index], strict=True):
                    assert torch.equal(got, torch.cat(expected))


def test_each_block_runs_once_for_each_look() -> None:
    """The encoder does not run again for the decoder; two attentions of one block are looked at one after the other."""
    model = lively("bart")
    layers, inputs = in_running_order(discovered_layers(model)), batches_for(model, 1)[0]
    assert can_skip(model, layers, inputs)
    blocks = list({id(layer.block): layer.block for layer in layers}.values())
    runs = [0] * len(blocks)
    for number, block in enumerate(blocks):
        block.self_attn.register_forward_pre_hook(
            lambda *_, number=number: runs.__setitem__(number, runs[number] + 1)  # type: ignore[misc]
        )
    walk = Walk(model, inputs, layers)
    for layer in layers:
        walk.seen(layer.index, layer.output)
    assert [len([each for each in layers if each.block is block]) for block in blocks] == [1, 1, 2, 2]
    assert runs == [2, 2, 3, 2], "one look at each attention, and once on the way to the next block"


def test_a_model_whose_blocks_are_added_up_outside_of_them_is_run_from_the_start() -> None:
    """Its blocks put out what is added to the stream, so that the last one's output is not what the next one gets."""
    torch.manual_seed(0)
    model = UnseenModel(UnseenConfig(depth=4)).eval()
    layers, batches = in_running_order(discovered_layers(model)), batches_for(model)
    assert not can_skip(model, layers, batches[0])
    want = outputs_of(model, layers, batches[0])
    walk = Walk(model, batches[0], layers, skips=False)
    for layer in layers:
        assert torch.equal(walk.seen(layer.index, layer.output).taken, want[layer.index][0][0])
    cut = {layer.index: [0, 1] for layer in layers}
    unfitted = prune_heads(copy.deepcopy(model), cut)
    fitted = prune_heads(copy.deepcopy(model), cut, calibration=batches)
    assert distance(fitted, model, batches) < 0.9 * distance(unfitted, model, batches)


@torch.no_grad()
def distance(one: Any, other: Any, batches: Any) -> float:
    return float(sum((one(**b)[0] - other(**b)[0]).square().sum() for b in batches))


@pytest.mark.parametrize("model_type", [*WALKED, "albert", "granite"])
def test_the_stream_is_what_the_attention_is_added_to(model_type: str) -> None:
    """With its sum with the attention's output seen as some module's input, or added to what follows it."""
    model = lively(model_type)
    layers, inputs = in_running_order(discovered_layers(model)), batches_for(model, 1)[0]
    walk = Walk(model, inputs, layers, skips=can_skip(model, layers, inputs))
    given: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        given.extend(tensors_in((*args, output)))

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    handles += [module.register_forward_hook(note) for module in model.modules()]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    for layer in layers:
        seen = walk.seen(layer.index, layer.output, stream=True)
        assert torch.is_grad_enabled()
        if model_type in (*WITHOUT_STREAM, "albert"):
            assert seen.stream is None
            continue
        assert seen.stream is not None and seen.stream.shape == seen.output.shape
        total = seen.stream + seen.output
        alike = [x for x in given if x.numel() == total.numel()]
        errors = [float((x.reshape(total.shape) - total).abs().max()) for x in alike]
        assert min(errors) <= 1e-5 * float(total.abs().max()), layer.name


def first_group(model: Any) -> dict[int, list[int]]:
    """The query heads of each attention's first key/value head, or the first head."""
    found = discover(model)
    heads = {}
    for attention, own in zip(found.attentions, ownerships(model, found.attentions), strict=True):
        number = attention.num_heads
        group = [head for head in range(number) if own.key_head_of(head, number) == 0]
        heads[attention.index] = group if len(group) < number else [0]
    return heads


@pytest.mark.parametrize("model_type", [*(each for each in WALKED if each != "never seen"), "albert", "granite"])
def test_a_refit_after_pruning_brings_the_model_nearer(model_type: str) -> None:
    model = lively(model_type)
    batches, heads = batches_for(model), first_group(model)
    lost = {}
    for refit in ("none", "scale", "output"):
        options = {} if refit == "none" else {"calibration": batches, "refit": plain(refit)}
        changed = prune_heads(copy.deepcopy(model), heads, **options)
        lost[refit] = divergence(changed, model, batches)
        report = last_change(changed).refit  # type: ignore[union-attr]
        if refit == "none":
            assert report is None
            continue
        assert report.fits == refit and len(report.layers) == len(heads)
        assert all(layer.error_after <= layer.error_before * (1 + 1e-6) for layer in report.layers)
        assert str(report.num_tokens) in str(last_change(changed)).replace(",", "")
    assert lost["output"] < 0.9 * lost["none"]


@pytest.mark.parametrize("model_type", ["bart", "gpt_neox", "whisper"])
def test_errors_reached_are_those_of_the_residual_stream(model_type: str) -> None:
    """By definition, in float64, from whole forward passes: of a decoder's cross-attention, of parallel branches."""
    model = lively(model_type).double()
    batches = [{name: x.double() if x.is_floating_point() else x for name, x in b.items()} for b in batches_for(model)]
    heads = first_group(model)
    pruned = prune_heads(copy.deepcopy(model), heads)
    fitted = prune_heads(copy.deepcopy(model), heads, calibration=batches, refit=plain("output"))
    report = last_change(fitted).refit  # type: ignore[union-attr]
    layers = discovered_layers(fitted)
    for reached in report.layers:
        index = reached.index
        # Fitted up to this layer, and this layer before and after.
        before = copy.deepcopy(fitted)
        discovered_layers(before)[index].output.load_state_dict(discovered_layers(pruned)[index].output.state_dict())
        wanted, now, then = (stream_after(each, index, batches) for each in (model, before, fitted))
        y_before, y_after = (attention_output(each, index, batches) for each in (before, fitted))
        target = wanted - (now - y_before)
        total = target.square().sum()
        assert reached.error_before == pytest.approx(float((y_before - target).square().sum() / total), rel=1e-7)
        assert reached.error_after == pytest.approx(float((then - wanted).square().sum() / total), rel=1e-7)
        assert torch.allclose(now - y_before, then - y_after)
        assert layers[index].output is not None


def _of_real(layer: Any, parts: list[Tensor], batches: Any) -> Tensor:
    masks = [b.get(layer.padding, torch.ones(x.shape[:-1])) for b, x in zip(batches, parts, strict=True)]
    return torch.cat([x[m.bool()] for x, m in zip(parts, masks, strict=True)])


def attention_output(model: Any, index: int, batches: Any) -> Tensor:
    """What the layer's output projection puts out, of real tokens."""
    layers = discovered_layers(model)
    return _of_real(layers[index], [outputs_of(model, layers, b)[index][1][0] for b in batches], batches)


def stream_after(model: Any, index: int, batches: Any) -> Tensor:
    """The residual stream with the attention's output, as each family's own forward pass has it."""
    layer = discovered_layers(model)[index]
    block, family = layer.block, model.config.model_type
    found: list[Tensor] = []
    if family == "gpt_neox":  # x + attention + mlp is what the block puts out
        hook = block.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    elif family == "bart":
        norm = block.encoder_attn_layer_norm if layer.is_cross else block.self_attn_layer_norm
        hook = norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    else:  # whisper: the next norm takes the stream
        own = "encoder_attn_layer_norm" if hasattr(block, "encoder_attn") and not layer.is_cross else "final_layer_norm"
        hook = getattr(block, own).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for inputs in batches:
        logits(model, inputs)
    hook.remove()
    return _of_real(layer, found, batches)


def test_which_queries_can_be_fitted() -> None:
    expected = {"gpt2": {True}, "mixtral": {True}, "bart": {True, False}, "gemma2": {False}, "gpt_oss": {False},
                "qwen3_moe": {False}, "t5": {False}, "albert": {False}}  # fmt: skip
    for model_type, want in expected.items():
        layers = projected_layers(any_model(model_type))
        assert {can_fit_queries(layer) for layer in layers} == want, model_type
        assert not any(can_fit_queries(layer) for layer in layers if layer.is_cross)


def test_queries_that_prove_to_be_no_linear_map_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_attnkit.refitting.queries as queries

    model = lively("mixtral")
    batches = batches_for(model)
    monkeypatch.setattr(queries, "_rotation", lambda layer, run, walk, dtype: None)  # the rotation is not seen
    changed = convert_to_gqa(copy.deepcopy(model), 1, calibration=batches)
    report = last_change(changed).refit  # type: ignore[union-attr]
    assert all(layer.kl_before is None for layer in report.layers)
    assert all(layer.error_after < layer.error_before for layer in report.layers)


def test_full_is_no_refit_of_a_pruning() -> None:
    model = lively("gpt2")
    with unchanged(model), pytest.raises(ValueError, match="fits queries to keys that a conversion merged"):
        prune_heads(model, {0: [0]}, calibration=batches_for(model), refit="full")


@pytest.mark.parametrize("refit", ["output", "scale"])
def test_a_failing_batch_leaves_the_model_as_it_was(refit: str) -> None:
    model = lively("opt")
    batches = batches_for(model)
    batches[-1]["inputs_embeds"] = torch.zeros(*batches[-1].pop("input_ids").shape, 5)  # the model's are wider
    with unchanged(model), pytest.raises(RuntimeError):
        prune_heads(model, {0: [0]}, calibration=batches, refit=refit)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.inf
    nan = [{"input_ids": torch.full((2, 9), 5)}]
    with unchanged(model), pytest.raises(ValueError, match="NaN or infinity"):
        prune_heads(model, {0: [0]}, calibration=nan, refit=refit)


def test_outputs_that_are_constant_are_solved_for_too() -> None:
    """Their Gram matrix about the mean is nothing but rounding: the projection stays, the bias takes the target."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    for size in (1.0, 1e-28):
        sums = OutputSums(linear)
        a, y = size * torch.randn(1, 6).expand(50, 6), torch.randn(1, 3).expand(50, 3)
        sums.add(a, linear(a), y)
        weight, bias = solve(sums, linear, 0.1)
        assert torch.equal(weight, linear.weight) and bias is not None
        torch.testing.assert_close(a @ weight.T + bias, y, rtol=0, atol=1e-5)


def test_layers_without_a_known_output_projection_stay() -> None:
    """The pooling attention of SigLIP has one that is not found; the other layers are fitted."""
    model = lively("siglip_vision_model")
    layers = in_running_order(discovered_layers(model))
    known = [layer.index for layer in layers if layer.output is not None]
    assert 0 < len(known) < len(layers)
    batches = batches_for(model)
    changed = prune_heads(model, {known[0]: [0]}, calibration=batches)
    report = last_change(changed).refit  # type: ignore[union-attr]
    assert [layer.index for layer in report.layers] == known
    assert str(last_change(changed))
