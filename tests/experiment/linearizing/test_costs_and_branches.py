"""What a layer costs when it alone is linear, which layers are chosen, and what each branch contributes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.swapping import swapped
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import prune_heads
from hf_attnkit.attention.kind import ATTRIBUTE, PARAMETERS, Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.experiment.linearizing import layer_costs as costs_module
from hf_attnkit.experiment.linearizing.branches import branch_scores, linear_shares
from hf_attnkit.experiment.linearizing.layer_costs import costliest, divergence, layer_costs, uniform
from hf_attnkit.models.layers import attention_layers

HYBRID = {"feature_map": "taylor", "window": 3, "gate": "learned"}


def learned(model: PreTrainedModel) -> PreTrainedModel:
    """With features that are no longer at their start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if PARAMETERS in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# Costs.


def with_features(untouched: PreTrainedModel, learned: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy of the untouched model of which these layers are linear, with what the other has learned for them."""
    made = swapped(untouched, "linear", feature_map="hedgehog", layers=sorted(layers))
    made.load_state_dict({name: learned.state_dict()[name] for name in made.state_dict()})
    return made


@pytest.mark.parametrize(("family", "head"), [("bert", "sequence"), ("llama", "causal")])
@torch.no_grad()
def test_costs_are_those_of_two_models(family: str, head: str) -> None:
    """The untouched one and a copy of which a layer alone is linear with the same features, over real positions."""
    untouched = build(family, head, num_hidden_layers=3).double()
    model = learned(swapped(untouched, "linear", feature_map="hedgehog")).train()
    batches = [batch(model, (9, 5)), batch(model, (11, 3, 7), seed=1)]
    layers = attention_layers(model)
    given = [inputs | {"labels": torch.zeros_like(inputs["input_ids"])} for inputs in batches]
    found = layer_costs(model, [layers[0], layers[2]], given)
    assert list(found) == [0, 2] and model.training
    for index, cost in found.items():
        # Layer 1 is none of those that are compared, so it runs what it ran.
        was, now = (with_features(untouched, model, linear) for linear in ([1], [1, index]))
        total, count = 0.0, 0
        for inputs in batches:
            wanted, got = (each(**inputs).logits.log_softmax(-1) for each in (was, now))
            kl = (wanted.exp() * (wanted - got)).sum(-1)
            kl = kl if head == "sequence" else kl[inputs["attention_mask"].bool()]
            total, count = total + float(kl.sum()), count + kl.numel()
        assert cost == pytest.approx(total / count, rel=1e-6) and cost > 1e-5
    assert [getattr(layer.module, ATTRIBUTE) for layer in layers] == [LinearAttention("hedgehog")] * 3


@torch.no_grad()
def test_the_cost_of_a_regression_is_the_squared_difference() -> None:
    untouched = build("bert", "sequence", num_labels=1).double()
    model = swapped(untouched, "linear", feature_map="elu")
    inputs = batch(model)
    one = swapped(untouched, "linear", feature_map="elu", layers=[1])
    wanted = (one(**inputs).logits - untouched(**inputs).logits).square().mean()
    found = layer_costs(model, attention_layers(model), [inputs])
    assert found[1] == pytest.approx(float(wanted), rel=1e-6)


def test_a_layer_that_does_what_it_did_costs_nothing() -> None:
    """A window alone that is as long as the text is softmax attention."""
    model = swapped(build("llama", "causal"), "linear", window=100)
    for cost in layer_costs(model, attention_layers(model), [batch(model)]).values():
        assert abs(cost) < 1e-10


def test_layers_run_what_they_ran_after_an_error() -> None:
    model = swapped(build("bert"), "linear")
    model.pooler.register_forward_hook(lambda *_: 1 / 0)
    for function in (layer_costs, lambda model, _, batches: linear_shares(model, batches)):
        with pytest.raises(ZeroDivisionError):
            function(model, attention_layers(model), [batch(model)])
    assert [getattr(layer.module, ATTRIBUTE) for layer in attention_layers(model)] == [LinearAttention()] * 2


def test_divergence_is_summed_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = (3 * torch.randn(13, 5, generator=generator) for _ in range(2))
    p, q = (x.double().softmax(-1) for x in (wanted, found))
    expected = float((p * (p / q).log()).sum())
    assert divergence(found, wanted) == pytest.approx(expected, rel=1e-12)
    calls: list[int] = []
    chunk = costs_module.F.log_softmax

    def noting(x: Tensor, dim: int) -> Tensor:
        calls.append(len(x))
        return chunk(x, dim=dim)

    monkeypatch.setattr(costs_module, "CHUNK", 20)
    monkeypatch.setattr(costs_module.F, "log_softmax", noting)
    assert divergence(found, wanted) == pytest.approx(expected, rel=1e-12)
    assert max(calls) == 4 and sum(calls) == 26
    squared = float((found - wanted)[:, 0].double().square().sum())
    assert divergence(found[:, :1], wanted[:, :1]) == pytest.approx(squared)


def test_costliest_and_uniform() -> None:
    costs = {0: 0.1, 3: 0.5, 4: 0.2, 7: 0.5}
    assert costliest(costs, 1) in ([3], [7])
    assert costliest(costs, 2) == [3, 7] and costliest(costs, 3) == [3, 4, 7]
    assert costliest(costs, 0) == [] and uniform([0, 1], 0) == []
    assert uniform(range(12), 2) == [3, 9] and uniform(range(12), 4) == [1, 4, 7, 10]
    assert uniform([2, 5, 9], 1) == [5] and uniform([2, 5, 9], 3) == [2, 5, 9]
    for number in range(1, 30):
        assert len(set(uniform(range(30), number))) == number


# Branches.


def test_scores_of_each_branch_are_of_models_that_have_it_alone() -> None:
    model = learned(swapped(build("bert", num_hidden_layers=3), "linear", **HYBRID, layers=[0, 2]))
    inputs = batch(model)

    def measure() -> float:
        with torch.no_grad():
            return float(model(**inputs).last_hidden_state.double().square().mean())

    kinds = [getattr(layer.module, ATTRIBUTE, None) for layer in attention_layers(model)]
    found = branch_scores(model, measure)
    assert [getattr(layer.module, ATTRIBUTE, None) for layer in attention_layers(model)] == kinds
    for branch in ("both", "window", "linear"):
        alone = swapped(model, "linear", **HYBRID, branches=branch, layers=[0, 2])
        with torch.no_grad():
            wanted = float(alone(**inputs).last_hidden_state.double().square().mean())
        assert found[branch] == wanted
    assert len(set(found.values())) == 3
    assert branch_scores(swapped(build("bert"), "linear"), measure) == {}  # one branch alone


@dataclass(frozen=True)
class Noting(LinearAttention):
    """Linear attention that keeps the energies of its parts, counted token by token."""

    energies: list[float] | None = None

    def attention(self, *tensors: Any, call: Call, scaling: float, **options: Any) -> Any:
        assert self.energies is not None
        mask, parts = tensors[3], self.parts(*tensors, scaling=scaling, call=Call(parameters=call.parameters))
        for place, part in enumerate(parts):
            for row, token in product(range(part.shape[0]), range(part.shape[2])):
                if mask.key_visible is None or mask.key_visible[row, token]:
                    self.energies[place] += float(part[row, :, token].double().square().sum())
        return super().attention(*tensors, call=call, scaling=scaling, **options)


def shares_by_hand(model: PreTrainedModel, batches: list[dict[str, Tensor]], layers: list[int]) -> dict[int, float]:
    energies = {index: [0.0, 0.0] for index in layers}
    for layer in attention_layers(model):
        if layer.index in layers:
            kind = Noting(**HYBRID, decay="learned", energies=energies[layer.index])
            setattr(layer.module, ATTRIBUTE, kind)
    with torch.no_grad():
        for inputs in batches:
            model(**inputs, use_cache=False)
    return {layer: far / (near + far) for layer, (near, far) in energies.items()}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_shares_are_energies_of_the_parts_over_real_tokens(family: str) -> None:
    model = learned(swapped(build(family, num_hidden_layers=3), "linear", **HYBRID, decay="learned", layers=[0, 2]))
    batches = [batch(model, (11, 6)), batch(model, (9, 9, 4), seed=1)]
    found = linear_shares(model.train(), batches)
    assert model.training and set(found) == {0, 2} and all(0 < share < 1 for share in found.values())
    wanted = shares_by_hand(model.eval(), batches, [0, 2])
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_gate_far_open_to_one_side_has_the_share_of_that_side() -> None:
    model = swapped(build("llama"), "linear", **HYBRID)
    inputs = batch(model, (12, 12))
    for size, share in ((80.0, 0.0), (-80.0, 1.0)):
        with torch.no_grad():
            for layer in attention_layers(model):
                getattr(layer.module, PARAMETERS).gate.weight.fill_(size)
        found = linear_shares(model, [inputs])
        # Of a query without a key beyond the window the window gives all: 3 of 12.
        assert all(each == pytest.approx(share, abs=1e-6 if share == 0 else 0.7) for each in found.values())
    assert linear_shares(swapped(build("llama"), "linear"), [inputs]) == {}


def test_a_layer_without_heads_has_no_share() -> None:
    """And not 0 / 0, which no results.json holds."""
    model = swapped(prune_heads(build("bert"), {0: range(8)}), "linear", **HYBRID)
    found = linear_shares(model, [batch(model)])
    assert found[0] == 0 and 0 < found[1] < 1
