"""`reach`: what a head loses in the residual stream when it sees the first tokens and a window only."""

from __future__ import annotations

import copy

import pytest
import torch
from support.every_type import small_model
from support.models import batch, build, reads_both_ways
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_attnkit import head_importance, swap_attention
from hf_attnkit.common.state import frozen
from hf_attnkit.models.known import known
from hf_attnkit.models.layers import attention_layers, projected_layers
from hf_attnkit.observing.outputs import batch_generator, final_outputs, mixed, real_outputs, vocabulary_of

LENGTHS, WINDOW, SINKS = (13, 7, 10), 3, 2


def what_is_lost(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Of one sequence without padding `(length,)`, per layer a_h - b_h `(num_heads, length, head_dim)`: from eager
    attention matrices and values of a model in float64."""
    layers = projected_layers(model)
    values: dict[int, Tensor] = {}
    handles = [
        layer.value.register_forward_hook(lambda module, args, out, index=layer.index: values.update({index: out[0]}))
        for layer in layers
    ]
    matrices = model(ids[None], output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    i, j = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    near = ((i - j).abs() < WINDOW) | (j < SINKS)
    found = []
    for layer, matrix in zip(layers, matrices, strict=True):
        value = values[layer.index].unflatten(-1, (layer.num_key_value_heads, -1)).transpose(0, 1)
        value = value.repeat_interleave(layer.num_heads // layer.num_key_value_heads, 0)
        windowed = matrix[0] * near
        found.append(((matrix[0] - windowed / windowed.sum(-1, keepdim=True)) @ value).detach())
    return found


def by_definition(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """In float64, each sequence by itself: no padding."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    layers = projected_layers(model)
    total, count = torch.zeros(len(layers), layers[0].num_heads, dtype=torch.float64), 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        for layer, lost in zip(layers, what_is_lost(model, inputs["input_ids"][row][mask]), strict=True):
            weight = layer.output.weight.unflatten(1, (layer.num_heads, -1))
            total[layer.index] += torch.einsum("hqd,ehd->hqe", lost, weight).square().sum((1, 2)).detach()
        count += int(mask.sum())
    return total / count


@pytest.mark.parametrize("family", ["bert", "llama", "grouped"])
def test_against_the_definition(family: str) -> None:
    model = build("llama", "causal", 8, 2) if family == "grouped" else build(family)
    inputs = batch(model, LENGTHS)
    found = head_importance(model, [inputs], method="reach", window=WINDOW, num_sink_tokens=SINKS)
    expected = by_definition(model, inputs)
    assert found.shape == expected.shape and (expected > 0).all()
    assert reads_both_ways(model) == (family == "bert")
    # float32 attention of 13 keys and 8 values a head; differences of outputs cancel some of their bits.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def in_outputs(model: PreTrainedModel, inputs: dict[str, Tensor], signs: list[Tensor] | None) -> Tensor:
    """The mean over queries of (r . dz/da (a - b))^2 in float64, each sequence by itself; of a single output z that is
    |dz/da (a - b)|^2, whatever the sign r."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    layers = projected_layers(model)
    total, count = torch.zeros(len(layers), layers[0].num_heads, dtype=torch.float64), 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row][mask]
        for layer, lost in zip(layers, what_is_lost(model, ids), strict=True):
            moved = torch.zeros_like(lost.transpose(0, 1), requires_grad=True)
            handle = layer.output.register_forward_pre_hook(
                lambda module, args, moved=moved: (args[0] + moved.flatten(-2),)
            )
            outputs = model(ids[None]).logits[0]
            handle.remove()
            total_output = (outputs * (1 if signs is None else signs[row])).sum()
            gradient = torch.autograd.grad(total_output, moved)[0]
            total[layer.index] += torch.einsum("thd,htd->ht", gradient, lost).square().sum(1)
        count += int(mask.sum())
    return total / count


@pytest.mark.parametrize("family", ["bert", "grouped"])
def test_in_the_outputs(family: str) -> None:
    if family == "bert":
        model = build("bert", "sequence", num_labels=1)
    else:
        model = build("llama", "causal", 4, 2, num_hidden_layers=1)
    inputs = batch(model, (6, 4))
    real, signs = inputs["attention_mask"].bool(), None
    if family == "grouped":
        # The word that is drawn at each position, less what was to be expected.
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(**inputs).logits[real].softmax(-1)
        drawn = torch.rand(len(expected), 1, generator=batch_generator(inputs))
        words = (expected.float().cumsum(-1) < drawn).sum(-1)
        signs = list((F.one_hot(words, expected.shape[-1]) - expected).split(real.sum(1).tolist()))
    options = {"window": WINDOW, "num_sink_tokens": SINKS, "measure": "outputs"}
    before = [parameter.requires_grad for parameter in model.parameters()]
    found = head_importance(copy.deepcopy(model).double(), [inputs], method="reach", **options)
    expected = in_outputs(model, inputs, signs)
    assert (expected > 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7 * float(expected.max()))
    single = head_importance(model, [inputs], method="reach", **options)
    torch.testing.assert_close(single.double(), expected, rtol=1e-2, atol=1e-4 * float(expected.max()))
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_count_by_their_tokens_and_a_window_over_all_loses_nothing() -> None:
    model = build("llama")
    inputs = batch(model, LENGTHS)
    whole = head_importance(model, [inputs], method="reach", window=WINDOW)
    rows = [{name: tensor[row : row + 1] for name, tensor in inputs.items()} for row in range(3)]
    torch.testing.assert_close(head_importance(model, rows, method="reach", window=WINDOW), whole, rtol=1e-4, atol=0)
    nothing = head_importance(model, [inputs], method="reach", window=20)
    assert (nothing <= 1e-10 * whole.max()).all()


def test_a_cap_of_scores_is_applied() -> None:
    """Gemma 2's: with a cap so low that all keys count alike, means over keys tell the score."""
    model = small_model("gemma2").double()
    inputs = {"input_ids": torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))}
    before = head_importance(model, [inputs], method="reach", window=2, num_sink_tokens=1)
    for layer in attention_layers(model):
        layer.module.attn_logit_softcapping = 1e-9
    found = head_importance(model, [inputs], method="reach", window=2, num_sink_tokens=1)
    layer = attention_layers(model)[0]
    values: list[Tensor] = []
    handle = layer.module.v_proj.register_forward_hook(lambda module, args, out: values.append(out[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    value = values[0].unflatten(-1, (-1, layer.head_dim)).transpose(0, 1)
    value = value.repeat_interleave(layer.num_heads // len(value), 0)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    past = (j <= i).double()
    near = past * ((i - j < 2) | (j < 1))
    lost = (past / past.sum(-1, keepdim=True) - near / near.sum(-1, keepdim=True)) @ value
    weight = layer.module.o_proj.weight.unflatten(1, (layer.num_heads, -1))
    expected = torch.einsum("hqd,ehd->hqe", lost, weight).square().sum((1, 2)) / 12
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=0)
    assert not torch.allclose(before, found)


@pytest.mark.parametrize("name", ["mlcd", "bitnet", "sam3_vision_model"])
def test_whatever_lies_between_heads_and_projection(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of axes, a norm, rows and columns of an image: by an attention function with gates in it."""
    model = small_model(name)
    inputs = known(model).discovery.inputs
    inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    found = head_importance(model, [inputs], method="reach", window=2, num_sink_tokens=1, measure="outputs")
    gates: list[Tensor] = []

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])
        seen = j <= i if module.is_causal else torch.ones_like(j <= i)
        near = seen & (((i - j).abs() < 2) | (j < 1))
        far, close = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value for mask in (seen, near))
        gates.append(torch.zeros(far.shape[:3], requires_grad=True))
        return (far + gates[-1][..., None] * (far - close).detach()).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "gated", attend)
    model.set_attn_implementation("gated")
    with frozen(model):
        changed = mixed(final_outputs(model(**inputs)), inputs, batch_generator(inputs), vocabulary_of(model))
        gradients = torch.autograd.grad(changed, gates)
    expected = torch.stack([gradient.square().mean((0, 2)) for gradient in gradients])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_words_are_drawn_from_their_distribution() -> None:
    """The mean of (r . v)^2 over many draws is that of p, which is twice the divergence to second order."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, dtype=torch.float64, generator=generator)
    v = torch.randn(7, dtype=torch.float64, generator=generator)
    number = 40_000
    logits = z.expand(number, 1, 7).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixed({"logits": logits}, {}, generator, 7), logits)
    found = (gradient[:, 0] @ v).square()
    p = z.softmax(-1)
    expected = (p * v**2).sum() - (p @ v) ** 2
    assert abs(found.mean() - expected) < 5 * found.std() / number**0.5
    small = 1e-3 * v
    divergence = (p * (z.log_softmax(-1) - (z + small).log_softmax(-1))).sum()
    assert 2 * divergence == pytest.approx(float(expected) * 1e-6, rel=1e-2)


def test_signs_are_of_the_batch() -> None:
    """So that several processes, or another order, give the same."""
    model = build("llama")
    first, second = batch(model, LENGTHS), batch(model, (6, 12), seed=1)
    options = {"method": "reach", "window": WINDOW, "measure": "outputs"}
    whole = head_importance(model, [first, second], **options)
    tokens = [int(each["attention_mask"].sum()) for each in (first, second)]
    apart = [
        head_importance(model, [each], **options) * count for each, count in zip((first, second), tokens, strict=True)
    ]
    torch.testing.assert_close(whole, sum(apart) / sum(tokens))
    assert torch.equal(whole, head_importance(model, [first, second], **options))


def test_outputs_that_do_not_tell_or_are_of_another_text() -> None:
    model = build("bert", "question")
    inputs = batch(model, LENGTHS)
    options = {"method": "reach", "window": 2, "measure": "outputs"}
    expected = head_importance(model, [inputs], **options)
    model.config.return_dict = False
    assert torch.equal(head_importance(model, [inputs], **options), expected)
    model = small_model("t5")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
    logits = torch.zeros(2, 9, 3)
    assert len(real_outputs("logits", logits, inputs)) == 18  # the mask is the encoder's
    assert len(real_outputs("logits", logits, inputs | {"decoder_attention_mask": mask})) == 14
    assert len(real_outputs("logits", logits, {"input_ids": ids, "attention_mask": mask})) == 14


def test_cross_attention_has_none() -> None:
    model = small_model("t5")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    found = head_importance(model, [{"input_ids": ids, "decoder_input_ids": ids}], method="reach", window=2)
    is_cross = torch.tensor([layer.is_cross for layer in attention_layers(model)])
    assert is_cross.any() and found[is_cross].isnan().all() and found[~is_cross].isfinite().all()
    again = head_importance(
        model, [{"input_ids": ids, "decoder_input_ids": ids}], method="reach", window=2, measure="outputs"
    )
    assert again[is_cross].isnan().all() and (again[~is_cross] > 0).all()


def test_bad_input() -> None:
    model = build("llama")
    for options, message in (
        ({"window": 0}, "window=0 must be"),
        ({"num_sink_tokens": -1}, "num_sink_tokens=-1 must"),
        ({"measure": "loss"}, "measure='loss' must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            head_importance(model, [batch(model)], method="reach", **options)
    with pytest.warns(UserWarning, match="another function"):
        swap_attention(model, "linear")
    with pytest.raises(ValueError, match="linear attention, which has no window"):
        head_importance(model, [batch(model)], method="reach", window=2)


def test_heads_whose_outputs_no_matrix_takes() -> None:
    model = small_model("jetmoe")
    ids = torch.randint(3, 60, (2, 9))
    with pytest.raises(ValueError, match=r"no matrix product takes its heads' outputs.*take a score of attention"):
        head_importance(model, [{"input_ids": ids}], method="reach")
