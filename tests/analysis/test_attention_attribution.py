"""Rollout and flow against independent computations, heads that are matched, and how much they differ."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from support.models import batch, build
from support.swapping import swapped
from torch import Tensor

from hf_attnkit import attention_view, convert_to_gqa, prune_heads
from hf_attnkit.analysis.view.maps import AttentionMap, Example, Sequence
from hf_attnkit.analysis.view.matching import match
from hf_attnkit.analysis.view.rollout import rollout


def eager(model: Any, inputs: dict[str, Tensor]) -> Any:
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rollout_is_the_product_of_the_layers(family: str) -> None:
    model = build(family)
    inputs = batch(model, (7,))
    (found,) = attention_view(model, inputs).rollout()
    product = np.eye(7)
    for step, matrix in enumerate(eager(model, inputs).attentions):
        product = (matrix[0].mean(0).numpy() + np.eye(7)) / 2 @ product
        np.testing.assert_allclose(found.shares[step], product, atol=1e-4)
    assert found.steps[0].startswith("layer 0") and len(found.steps) == 2


def test_rollout_of_an_encoder_decoder_is_that_of_one_long_sequence() -> None:
    """All tokens of encoder and decoder in one matrix, whose rows sum to 1 after each step."""
    model = build("t5", "causal")
    inputs = batch(model, (7,))
    n, m = 7, 5
    wanted = eager(model, inputs)
    whole = np.eye(n + m)

    def step(rows: slice, columns: slice, matrix: Tensor) -> None:
        nonlocal whole
        weights = np.eye(n + m)
        weights[rows, columns] += matrix[0].mean(0).numpy()
        weights[rows] /= 2
        whole = weights @ whole

    encoder, decoder = slice(0, n), slice(n, n + m)
    for matrix in wanted.encoder_attentions:
        step(encoder, encoder, matrix)
    for own, cross in zip(wanted.decoder_attentions, wanted.cross_attentions, strict=True):
        step(decoder, decoder, own)
        step(decoder, encoder, cross)
    found = {(each.queries, each.keys): each.shares[-1] for each in attention_view(model, inputs).rollout()}
    assert len(found) == 3
    own = next(pair[0] for pair in found if len(found[pair]) == n)
    other = 1 - own
    np.testing.assert_allclose(found[own, own], whole[:n, :n], atol=2e-4)
    np.testing.assert_allclose(found[other, other], whole[n:, n:], atol=2e-4)
    np.testing.assert_allclose(found[other, own], whole[n:, :n], atol=2e-4)


def maximum_flow(capacities: dict[tuple[Any, Any], float], source: Any, target: Any) -> float:
    """As a linear program: the most that leaves the source, nothing lost on the way."""
    edges = list(capacities)
    nodes = sorted({node for edge in edges for node in edge} - {source, target})
    balance = np.array([[(edge[1] == node) - (edge[0] == node) for edge in edges] for node in nodes], float)
    out = np.array([(edge[0] == source) - (edge[1] == source) for edge in edges], float)
    solved = linprog(-out, A_eq=balance, b_eq=np.zeros(len(nodes)), bounds=[(0, capacities[edge]) for edge in edges])
    assert solved.status == 0
    return -float(solved.fun)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_flow_is_the_maximum_flow(family: str) -> None:
    model = build(family)
    inputs = batch(model, (5,))
    view = attention_view(model, inputs)
    matrices = [(matrix[0].mean(0) + torch.eye(5)) / 2 for matrix in eager(model, inputs).attentions]
    capacities = {
        ((layer + 1, i), (layer, j)): float(matrix[i, j])
        for layer, matrix in enumerate(matrices)
        for i in range(5)
        for j in range(5)
        if matrix[i, j] > 0
    }
    for token in (0, 4):
        (found,) = view.attention_flow(token)
        assert found.flows.shape == (2, 5)
        for step in range(2):
            for key in range(5):
                reached = family == "bert" or key <= token
                wanted = maximum_flow(capacities, (step + 1, token), (0, key)) if reached else 0.0
                assert float(found.flows[step, key]) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ValueError, match=r"token=5 must be an integer from 0 to 4"):
        view.attention_flow(5)


def test_what_flows_through_a_decoder_reaches_the_encoder() -> None:
    model = build("bart", "causal")
    view = attention_view(model, batch(model, (5,)))
    own, other = sorted(view.attention_flow(2), key=lambda each: each.queries != each.keys)
    assert own.queries == own.keys != other.keys and other.queries == own.queries
    assert not other.flows[0].any() and other.flows[1].all()  # the first attention is the decoder's own
    assert float(own.flows.max()) <= 1 + 1e-6


def test_attributions_end_where_an_attention_has_no_weights() -> None:
    sequence = Sequence("layers", ("a", "b"), True, 1)
    common: dict[str, Any] = {"call": 0, "kind": "", "queries": 0, "keys": 0, "is_cross": False,
                              "num_key_value_heads": 1}  # fmt: skip
    maps = (
        AttentionMap(layer=0, name="layer 0", weights=torch.full((1, 2, 2), 0.5), **common),
        AttentionMap(layer=1, name="layer 1", missing="linear attention has no attention weights", **common),
    )
    found, why = rollout(Example((sequence,), maps))
    assert not found and why == "layer 1: linear attention has no attention weights"
    model = swapped(build("llama"), "linear", layers=[1])
    view = attention_view(model, batch(model, (5,)))
    for ask in (view.rollout, lambda: view.attention_flow(0)):
        with pytest.raises(ValueError, match=r"layer 1 .*linear attention"):
            ask()
    emptied = prune_heads(build("llama"), {1: range(8)})
    assert len(attention_view(emptied, batch(emptied, (5,))).rollout()[0].steps) == 1


def test_heads_are_matched_through_pruning() -> None:
    model = build("bert")
    inputs = batch(model, (13,))
    changed = prune_heads(copy.deepcopy(model), {0: [1, 3], 1: [0]})
    view = attention_view(model, inputs, compare=changed)
    first, second = view.differences[0]
    assert first.matched == (0, None, 1, None, 2, 3, 4, 5)
    assert second.matched == (None, 0, 1, 2, 3, 4, 5, 6)
    # The first layer's inputs are the same: nothing differs but what is gone.
    assert first.total.isnan().tolist() == [False, True, False, True, False, False, False, False]
    assert float(first.total.nan_to_num().max()) < 1e-5
    p, q = view.examples[0].maps[1].weights, view.compared[0].maps[1].weights
    assert p is not None and q is not None
    wanted = (p[1:] - q).abs().sum(-1) / 2
    torch.testing.assert_close(second.by_query[1:], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(second.total[1:], wanted.mean(-1), rtol=0, atol=1e-6)
    assert float(second.total[1:].min()) > 0.01


def reordered(model: Any, order: Tensor) -> Any:
    """The same function with each layer's heads in another order and their values in another basis."""
    changed = copy.deepcopy(model)
    rows = (order[:, None] * 8 + torch.arange(8)).flatten()
    for layer in changed.encoder.layer:
        turn = torch.block_diag(*(torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(8)))
        own, output = layer.attention.self, layer.attention.output.dense
        for projection in (own.query, own.key, own.value):
            projection.weight.data, projection.bias.data = projection.weight[rows], projection.bias[rows]
        own.value.weight.data, own.value.bias.data = turn @ own.value.weight, turn @ own.value.bias
        output.weight.data = output.weight[:, rows] @ turn.T
    return changed


def test_heads_are_matched_in_another_order_and_basis() -> None:
    model, order = build("bert"), torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    torch.manual_seed(0)
    view = attention_view(model, batch(model, (13,)), compare=reordered(model, order).eval())
    for found in view.differences[0]:
        assert [found.matched[head] for head in order.tolist()] == list(range(8))
        assert float(found.total.max()) < 1e-4


def test_heads_are_matched_through_merging() -> None:
    """`grouping="best"` puts heads in another order, and `pca` writes values in another basis."""
    model = build("bert")
    inputs = batch(model, (13,))
    options: Any = {"method": "pca", "calibration": [batch(model, (13, 13, 13), seed=1)]}
    for grouping in ("adjacent", "best"):
        changed = convert_to_gqa(copy.deepcopy(model), 4, grouping=grouping, **options)
        view = attention_view(model, inputs, compare=changed)
        orders = [found.matched for found in view.differences[0]]
        assert all(set(order) == set(range(8)) for order in orders)
        assert (grouping == "adjacent") == all(order == tuple(range(8)) for order in orders)
        assert view.compared[0].maps[0].num_key_value_heads == 4
        # Heads that were matched at random would differ more.
        p, q = view.examples[0].maps[0].weights, view.compared[0].maps[0].weights
        assert p is not None and q is not None
        every = (p[:, None] - q).abs().sum(-1).mean(-1) / 2
        assert float(view.differences[0][0].total.mean()) < float(every.mean())


def test_a_swap_is_compared_head_by_head() -> None:
    model = build("llama", "base", 8, 2)
    inputs = batch(model, (13,))
    view = attention_view(model, inputs, compare=swapped(model, "streaming_heads", heads=[1], window=3))
    found = view.differences[0][0]
    assert found.matched == tuple(range(8))
    assert float(found.total[:4].max()) < 1e-6 < 0.01 < float(found.total[4:].min())
    linear = attention_view(model, inputs, compare=swapped(model, "linear", layers=[1]))
    assert linear.differences[0][1].total.isnan().all()


def test_matching_by_number_and_by_attention() -> None:
    unlike = torch.full((3, 3), 0.1)
    assert match(unlike, None, 3, 3) == (0, 1, 2)
    apart = torch.tensor([[0.9, 0.1], [0.05, 0.8], [0.5, 0.5]])
    assert match(None, apart, 3, 2) == (1, 0, None)
    agree = torch.tensor([[0.1, 0.9], [0.2, 0.1], [0.1, 0.2]])
    assert match(agree, apart, 3, 2) == (1, 0, None)
