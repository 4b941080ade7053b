"""Head scores: what they measure, what they do not depend on, and that looking changes nothing."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from support.entropies import definition
from support.importances import tolerance
from support.models import DECODERS, batch, build, reads_both_ways
from support.unchanged import unchanged
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import convert_to_gqa, head_importance, prune_heads, swap_attention
from hf_attnkit.attention.dispatch import observe
from hf_attnkit.importance import METHODS
from hf_attnkit.models.layers import attention_layers

FAMILIES = ("bert", *DECODERS)


every_family = pytest.mark.parametrize("family", FAMILIES)


every_method = pytest.mark.parametrize("method", list(METHODS))


LENGTHS = (13, 7, 10)


def eager_entropy(model: PreTrainedModel, inputs: dict[str, Tensor], normalize: bool) -> Tensor:
    """By definition, from the attention matrices of an eager float64 run of each sequence by itself."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    total, count = torch.zeros(len(attention_layers(model)), 8, dtype=torch.float64), 0
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row][mask][None]
        matrices = model(ids, output_attentions=True).attentions
        p = torch.stack([matrix[0].double() for matrix in matrices])  # (layers, heads, queries, keys)
        entropy = -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
        keys = torch.full((len(ids[0]),), len(ids[0]))
        if not reads_both_ways(model):
            keys = torch.arange(1, len(ids[0]) + 1)
        if normalize:
            entropy = torch.where(keys > 1, entropy / keys.clamp(min=2).log(), 0.0)
        count += int((keys > 1).sum()) if normalize else len(keys)
        total += entropy.sum(-1).detach()
    return total / count


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "nats"])
@pytest.mark.parametrize("family", [*FAMILIES, "grouped"])
def test_entropy_is_that_of_eager_attention(family: str, normalize: bool) -> None:
    model = build("llama", "causal", 8, 2) if family == "grouped" else build(family)
    inputs = batch(model, LENGTHS)
    actual = head_importance(model, [inputs], method="entropy", direction="diffuse", normalize=normalize)
    assert actual.shape == (2, 8) and actual.dtype == torch.float32
    assert actual.max() - actual.min() > 0.05  # heads differ, so that a mixed-up order shows
    assert (actual - eager_entropy(model, inputs, normalize)).abs().max() <= tolerance(1 if normalize else 3)


def test_definition_of_the_reference() -> None:
    """`test_entropy.definition` and the eager formula here are the same number for uniform attention."""
    query = torch.zeros(1, 1, 3, 2)
    uniform = definition(query, query, torch.ones(1, 1, 3, 3, dtype=torch.bool), 1.0)
    assert torch.allclose(uniform, torch.tensor(3.0, dtype=torch.float64).log())


@every_family
def test_padding_and_batch_size_do_not_count(family: str) -> None:
    """One padded batch, one sentence at a time, and other batches of them: the same scores."""
    model = build(family)
    inputs = batch(model, LENGTHS)
    together = head_importance(model, [inputs], method="entropy")
    alone = [
        {"input_ids": inputs["input_ids"][row][mask.bool()][None], "attention_mask": torch.ones(1, int(mask.sum()))}
        for row, mask in enumerate(inputs["attention_mask"])
    ]
    halves = [{name: tensor[:2] for name, tensor in inputs.items()}, alone[2]]
    for batches in (alone, halves, reversed(alone), iter(alone)):
        assert (head_importance(model, batches, method="entropy") - together).abs().max() <= tolerance()


@pytest.mark.parametrize("other", ["eager", "mha", "gqa", "flash", "one layer swapped"])
@every_family
def test_the_implementation_does_not_matter(family: str, other: str) -> None:
    model = build(family)
    inputs = batch(model, LENGTHS)
    expected = head_importance(model, [inputs], method="entropy")
    if other == "eager":
        model.set_attn_implementation("eager")
    elif other == "one layer swapped":
        swap_attention(model, "flash", layers=[1])
    else:
        swap_attention(model, other)
    with unchanged(model):
        assert (head_importance(model, [inputs], method="entropy") - expected).abs().max() <= tolerance()


def test_entropy_sees_the_window_that_the_model_has() -> None:
    """Mistral's window limits the keys: with a window of 1 every query sees one key."""
    narrow = build("mistral", sliding_window=2)
    inputs = batch(narrow, LENGTHS)
    assert (
        head_importance(narrow, [inputs], method="entropy", direction="diffuse", normalize=False).max()
        <= torch.tensor(2.0).log()
    )
    assert (
        head_importance(build("mistral"), [inputs], method="entropy", direction="diffuse", normalize=False).max()
        > torch.tensor(2.0).log()
    )
    lone = build("mistral", sliding_window=1)
    assert torch.equal(
        head_importance(lone, [inputs], method="entropy", direction="diffuse", normalize=False), torch.zeros(2, 8)
    )


def test_focused_is_the_opposite_of_diffuse() -> None:
    model = build("bert")
    inputs = [batch(model)]
    assert torch.equal(
        head_importance(model, inputs, method="entropy", direction="focused"),
        -head_importance(model, inputs, method="entropy", direction="diffuse"),
    )


def heads_outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Per layer `(tokens, heads, head_dim)` of one text, what its output projection gets."""
    found: list[Tensor] = []
    layers = attention_layers(model)
    handles = [
        layer.output.register_forward_pre_hook(
            lambda module, args, layer=layer: found.append(args[0][0].detach().unflatten(-1, (layer.num_heads, -1)))
        )
        for layer in layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "flash"])
@pytest.mark.parametrize("family", [*FAMILIES, "grouped"])
def test_contribution_and_confidence_are_their_definitions(family: str, implementation: str) -> None:
    model = build("llama", "causal", 8, 2) if family == "grouped" else build(family)
    inputs = batch(model, LENGTHS)
    eager = copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    texts = [row[mask.bool()][None] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    tokens = [torch.cat(layer) for layer in zip(*(heads_outputs(eager, ids) for ids in texts), strict=True)]
    contribution = torch.stack([
        torch.stack([
            ((a[:, h] - a[:, h].mean(0)) @ layer.output.weight[:, h * 8 : h * 8 + 8].T).square().sum(-1).mean().sqrt()
            for h in range(8)
        ])
        for a, layer in zip(tokens, attention_layers(eager), strict=True)
    ])  # fmt: skip
    weights = [torch.stack(eager(ids, output_attentions=True).attentions)[:, 0].amax(-1) for ids in texts]
    confidence = torch.cat(weights, dim=-1).mean(-1)
    if implementation == "flash":
        swap_attention(model, "flash")
    focus = 1 - head_importance(model, [inputs], method="entropy", direction="diffuse")
    for method, expected in {
        "contribution": contribution,
        "confidence": confidence,
        "entropy_contribution": focus * contribution,
    }.items():
        with unchanged(model):
            actual = head_importance(model, [inputs], method=method)
        assert expected.max() > 1.1 * expected.min()
        assert (actual - expected).abs().max() <= tolerance(float(expected.detach().max())), method


def test_joint_score_of_gradient_and_entropy() -> None:
    model = build("bert", "sequence")
    inputs = [batch(model) | {"labels": torch.tensor([0, 1, 0])}]
    parts = [head_importance(model, inputs, method="gradient"), head_importance(model, inputs, method="entropy")]
    scaled = [(part - part.min()) / (part.max() - part.min()) for part in parts]
    for alpha in (None, 0, 0.3, 1):
        share = 0.9 if alpha is None else alpha
        expected = share * scaled[0] + (1 - share) * scaled[1]
        actual = head_importance(model, iter(inputs), method="entropy_contribution", joint="hies", alpha=alpha)
        assert (actual - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps / float(parts[1].std())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joint": "sum"}, "joint='sum' .*'product', 'hies'"),
        ({"alpha": 0.5}, "belong to joint='hies'"),
        ({"joint": "hies", "alpha": 2}, "alpha=2"),
        ({"joint": "hies", "labels": "none"}, "labels='none'"),
    ],
)
def test_options_of_entropy_contribution(options: dict, message: str) -> None:
    model = build("bert")
    with unchanged(model), pytest.raises(ValueError, match=message):
        head_importance(model, [batch(model)], method="entropy_contribution", **options)


def test_swapped_windows_count_and_other_attention_is_refused() -> None:
    model = swap_attention(build("llama"), "sliding_window", window=2)
    inputs = batch(model, LENGTHS)
    scores = head_importance(model, [inputs], method="entropy", direction="diffuse", normalize=False)
    assert scores.min() > 0 and scores.max() <= torch.tensor(2.0).log()
    swap_attention(model, "local_global", window=2)  # and the first token
    scores = head_importance(model, [inputs], method="entropy", direction="diffuse", normalize=False)
    assert scores.max() <= torch.tensor(3.0).log()
    real = inputs["attention_mask"].bool()
    place = inputs["attention_mask"].cumsum(-1) - 1
    distance = place[:, :, None] - place[:, None]
    pattern = (distance >= 0) & ((distance < 2) | (place == 0)[:, None]) & real[:, None]
    found: list[Tensor] = []

    def look(module, query, key, value, mask, scaling) -> None:
        each = (query.double() @ key.double().mT * scaling).masked_fill(~pattern[:, None], -1e300).softmax(-1)
        found.append(-torch.xlogy(each, each).sum(-1).transpose(1, 2)[real].mean(0))

    with observe(look):
        model(**inputs)
    torch.testing.assert_close(scores.double(), torch.stack(found), rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="linear"):
        swap_attention(model, "linear")
    with unchanged(model), pytest.raises(ValueError, match=r"layer 0 runs linear attention.*restore_attention"):
        head_importance(model, [inputs], method="entropy")


def test_magnitude_definition() -> None:
    model = build("llama", "base", 8, 2)
    actual = head_importance(model, method="magnitude")
    assert torch.equal(actual, head_importance(model, [], method="magnitude"))
    for index, layer in enumerate(model.layers):
        a = layer.self_attn
        for head in range(8):
            own, shared = slice(head * 8, head * 8 + 8), slice(head // 4 * 8, head // 4 * 8 + 8)
            parts = (a.q_proj.weight[own], a.k_proj.weight[shared], a.v_proj.weight[shared], a.o_proj.weight[:, own])
            expected = torch.cat([part.double().flatten() for part in parts]).norm().item()
            # A sum of 2,048 positive squares in float32: relative error below sqrt(2,048) eps.
            assert abs(actual[index, head].item() - expected) <= 45 * 1.2e-7 * expected


def test_random_is_fixed_by_the_seed() -> None:
    model = build("bert")
    state = torch.random.get_rng_state()
    one = head_importance(model, method="random")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, head_importance(model, method="random", seed=0))
    assert not torch.equal(one, head_importance(model, method="random", seed=1))
    assert one.unique().numel() == 16 and one.min() >= 0 and one.max() < 1


@functools.cache  # scores leave it as it is
def uneven(family: str) -> Any:
    return prune_heads(convert_to_gqa(build(family, "sequence"), 4), {0: [0, 1, 2, 3], 1: [6, 7]})


@every_method
@every_family
def test_layers_with_different_numbers_of_heads(family: str, method: str) -> None:
    model = uneven(family)
    scores = head_importance(model, [batch(model) | {"labels": torch.tensor([0, 1, 1])}], method=method)
    assert scores.shape == (2, 6) and scores.dtype == torch.float32
    assert scores[0, :4].isfinite().all() and scores[0, 4:].isnan().all() and scores[1].isfinite().all()


# Each method under each implementation, each in another family.
LEFT = [
    (family, method, implementation)
    for number, method in enumerate(METHODS)
    for family, implementation in zip(FAMILIES, (["sdpa", "eager", "flash"] * 2)[number % 3 :], strict=False)
]


@pytest.mark.parametrize(("family", "method", "implementation"), LEFT)
def test_the_model_is_left_as_it_was(family: str, method: str, implementation: str) -> None:
    """In training mode with one layer evaluating, parameters with gradients, and after an error half way."""
    model = build(family, "sequence").train()
    if implementation == "flash":
        swap_attention(model, "flash")
    else:
        model.set_attn_implementation(implementation)
    attention_layers(model)[0].module.eval()
    inputs = batch(model)
    model(**inputs).logits.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with unchanged(model):
        scores = head_importance(model, [inputs | {"labels": torch.zeros(3, dtype=torch.long)}], method=method)
    assert not scores.requires_grad

    def broken() -> Any:
        yield inputs
        raise RuntimeError("the disk is gone")

    if method == "entropy":
        with unchanged(model), pytest.raises(RuntimeError, match="the disk is gone"):
            head_importance(model, broken(), method=method)
        with unchanged(model), pytest.raises(RuntimeError):
            head_importance(model, [inputs, {"inputs_embeds": torch.zeros(1, 3, 5)}], method=method)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in grads)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])


def test_a_model_in_training_is_scored_without_dropout() -> None:
    model = build("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    inputs = [batch(model)]
    expected = head_importance(model, inputs, method="entropy")
    assert torch.equal(head_importance(model.train(), inputs, method="entropy"), expected)


def test_another_call_after_an_error_observes_only_itself() -> None:
    """No observer stays behind."""
    from hf_attnkit.attention import dispatch as registry

    model = build("bert")
    with pytest.raises(ValueError, match="must be a mapping"):
        head_importance(model, [batch(model), None], method="entropy")
    assert registry._observers == []
