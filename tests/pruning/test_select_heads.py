"""Which heads `select_heads` chooses."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.every_type import small_model
from support.models import build
from transformers import FalconConfig, FalconModel, PreTrainedModel

from hf_attnkit import convert_to_gqa, head_importance, prune_heads, rearrange_heads, select_heads
from hf_attnkit.models.discovery import discover

SCORES = torch.tensor([[0.1, 0.5, 0.3, 0.9], [0.2, 0.8, 0.7, 0.6], [1.0, 1.1, 1.2, 1.3]])
NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_heads": 1}, {0: [0]}),
        ({"num_heads": 4}, {0: [0, 1, 2], 1: [0]}),
        ({"num_heads": 5}, {0: [0, 1, 2], 1: [0, 3]}),
        ({"num_heads": 4, "min_heads": 2}, {0: [0, 2], 1: [0, 3]}),
        ({"fraction": 0.25}, {0: [0, 2], 1: [0]}),
        ({"fraction": 0.33}, {0: [0, 2], 1: [0]}),
        ({"fraction": 0.5, "per_layer": True}, {0: [0, 2], 1: [0, 3], 2: [0, 1]}),
        ({"num_heads": 1, "per_layer": True}, {0: [0], 1: [0], 2: [0]}),
        ({"fraction": 0.0}, {}),
        ({"num_heads": 0}, {}),
        # Groups of two by their means: 0.3, 0.6 | 0.5, 0.65 | 1.05, 1.25
        ({"num_heads": 4, "num_key_value_heads": 2}, {0: [0, 1], 1: [0, 1]}),
        ({"fraction": 0.3, "num_key_value_heads": 2}, {0: [0, 1]}),
        ({"num_heads": 3, "num_key_value_heads": [2, 4, 1]}, {0: [0, 1], 1: [0]}),
        ({"num_heads": 8, "min_heads": 0}, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}),
        ({"fraction": 0.34, "min_heads": 0, "num_key_value_heads": 2}, {0: [0, 1], 1: [0, 1]}),
        # The first and then the second of each group of two: 0.2, 0.7 | 0.4, 0.7 | 1.1, 1.2
        ({"num_heads": 4, "num_key_value_heads": 2, "groups": "across"}, {0: [0, 2], 1: [0, 3]}),
        ({"fraction": 0.4, "num_key_value_heads": 2, "groups": "across", "per_layer": True}, {}),
        (
            {"fraction": 0.5, "num_key_value_heads": 2, "groups": "across", "per_layer": True},
            {0: [0, 2], 1: [0, 3], 2: [0, 2]},
        ),
        (
            {"num_heads": 8, "num_key_value_heads": 2, "groups": "across", "min_heads": 0},
            {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]},
        ),
        # Layer 1 shares nothing: its heads go one by one.
        ({"num_heads": 3, "num_key_value_heads": [2, 4, 1], "groups": "across"}, {0: [0, 2], 1: [0]}),
    ],
    ids=str,
)
def test_choice(options: dict, expected: dict) -> None:
    assert select_heads(SCORES, **options) == expected


def test_numbers_of_other_libraries_count_groups() -> None:
    for groups in (np.int64(2), np.array([2, 2, 2])):
        assert select_heads(SCORES, num_heads=2, num_key_value_heads=groups) == {0: [0, 1]}


def test_fractions_count_whole_heads_despite_rounding() -> None:
    """0.3 * 10 is 2.9999999999999996 in floating point."""
    scores = torch.arange(20.0).view(2, 10)
    assert select_heads(scores, fraction=0.3, per_layer=True) == {0: [0, 1, 2], 1: [0, 1, 2]}


def test_ties_go_to_the_lower_layer_and_head() -> None:
    assert select_heads(torch.zeros(2, 3), num_heads=3) == {0: [0, 1], 1: [0]}


def test_missing_heads_are_neither_counted_nor_chosen() -> None:
    """Layer 0 has two heads left of four."""
    scores = torch.tensor([[0.1, 0.2, NAN, NAN], [0.3, 0.4, 0.5, 0.6]])
    assert select_heads(scores, fraction=0.5) == {0: [0], 1: [0, 1]}
    assert select_heads(scores, num_heads=1, per_layer=True) == {0: [0], 1: [0]}


def test_a_layer_without_heads_has_nothing_to_choose() -> None:
    scores = torch.tensor([[NAN, NAN], [0.2, 0.1]])
    for groups in (None, 1, [1, 2]):
        for how in ("whole", "across") if groups else ("whole",):
            options = {"num_key_value_heads": groups, "groups": how, "min_heads": 0}
            assert select_heads(scores, fraction=0.5, **options) == ({} if (groups, how) == (1, "whole") else {1: [1]})
    with pytest.raises(ValueError, match="1 heads cannot be removed from layer 0: of 0"):
        select_heads(scores, num_heads=1, per_layer=True)


def test_a_score_that_is_no_number_never_renumbers_heads() -> None:
    """NaN in the middle of a row (a diverged model, say): refused, or the other heads keep their numbers."""
    scores = torch.tensor([[NAN, 0.1, 0.9]])
    try:
        chosen = select_heads(scores, num_heads=1)
    except ValueError as error:
        assert "NaN" in str(error)
    else:
        assert chosen == {0: [1]}


def test_low_precision_and_infinite_scores() -> None:
    assert select_heads(SCORES.bfloat16(), num_heads=2) == {0: [0], 1: [0]}
    assert select_heads(torch.tensor([[-torch.inf, 1.0, torch.inf]]), num_heads=2) == {0: [0, 1]}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 8)),
    fraction=st.floats(0, 1, exclude_max=True),
    per_layer=st.booleans(),
    min_heads=st.integers(1, 4),
    groups=st.booleans(),
    seed=st.integers(0, 100),
)
def test_properties(
    shape: tuple[int, int], fraction: float, per_layer: bool, min_heads: int, groups: bool, seed: int
) -> None:
    """Never empties a layer, removes the number asked for or refuses, and keeps no head below a removed one."""
    layers, heads = shape
    number = 2 if groups and heads % 2 == 0 else heads
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    scopes = [[layer] for layer in range(layers)] if per_layer else [list(range(layers))]
    group = heads // number
    free = max(heads - min_heads, 0) // group * group  # of one layer
    wanted = [int(fraction * heads * len(scope) + 1e-9) // group * group for scope in scopes]
    arguments = {"per_layer": per_layer, "min_heads": min_heads, "num_key_value_heads": number}
    if any(want > free * len(scope) for want, scope in zip(wanted, scopes, strict=True)):
        with pytest.raises(ValueError, match="ask for fewer"):
            select_heads(scores, fraction=fraction, **arguments)
        return
    removed = select_heads(scores, fraction=fraction, **arguments)
    assert all(chosen == sorted(set(chosen)) for chosen in removed.values())
    for scope, want in zip(scopes, wanted, strict=True):
        assert sum(len(removed.get(layer, [])) for layer in scope) == want
    for layer in range(layers):
        gone = set(removed.get(layer, []))
        kept = set(range(heads)) - gone
        assert len(kept) >= min(min_heads, heads)
        means = scores[layer].double().view(number, group).mean(1).repeat_interleave(group)
        assert not gone or not kept or means[sorted(gone)].max() <= means[sorted(kept)].min()


# The groups of a model.


def grouped_model() -> PreTrainedModel:
    """8 query heads over 4 and over 2 key/value heads, then none in layer 2."""
    model = build("llama", num_hidden_layers=3, kv_heads=4)
    convert_to_gqa(model, [4, 2, 4])
    return prune_heads(model, {2: range(8)})


def test_groups_are_read_from_the_model() -> None:
    model = grouped_model()
    scores = head_importance(model, method="magnitude")
    assert scores[2].isnan().all()
    for how in ("whole", "across"):
        for options in ({"fraction": 0.25}, {"num_heads": 4}, {"fraction": 0.5, "per_layer": True}):
            read = select_heads(scores, model=model, groups=how, **options)
            given = select_heads(scores, num_key_value_heads=[4, 2, 0], groups=how, **options)
            assert read == given and read != select_heads(scores, **options)
            prune_heads(copy.deepcopy(model), read)  # accepted: groups stay equal
    gradients = torch.randn(5, *scores.shape, generator=torch.Generator().manual_seed(0))
    gradients[:, scores.isnan()] = NAN
    chosen = select_heads(gradients.square().sum(0), model=model, fraction=0.5)
    read = rearrange_heads(gradients, chosen, model=model)
    assert read == rearrange_heads(gradients, chosen, num_key_value_heads=[4, 2, 0])
    prune_heads(model, read)


def test_scores_of_another_model_are_refused() -> None:
    model = grouped_model()
    scores = head_importance(model, method="magnitude")
    before = copy.deepcopy(model)
    prune_heads(model, {0: [0, 1]})
    message = r"has \[8, 8, 0\] heads in its layers, the model \[6, 8, 0\]; compute it with this model"
    with pytest.raises(ValueError, match=f"importance {message}"):
        select_heads(scores, model=model, num_heads=2)
    with pytest.raises(ValueError, match=r"importance has \[8, 8\] heads in its layers, the model \[8, 8, 0\]"):
        select_heads(scores[:2], model=before, num_heads=2)
    with pytest.raises(ValueError, match=f"gradients {message}"):
        rearrange_heads(scores[None], {0: [0]}, model=model)
    for call in (
        lambda: select_heads(scores, model=before, num_key_value_heads=4, num_heads=2),
        lambda: rearrange_heads(scores[None], {0: [0]}, model=before, num_key_value_heads=4),
    ):
        with pytest.raises(ValueError, match="give model or num_key_value_heads, not both"):
            call()
    with pytest.raises(TypeError, match=r"expected a transformers.PreTrainedModel, got str"):
        select_heads(scores, model="bert", num_heads=2)


# Layers that share a bias of the scores.


@pytest.mark.parametrize("model_type", ["t5", "mpnet"])
@pytest.mark.parametrize(
    "options",
    [
        {"fraction": 0.5},
        {"fraction": 0.3, "per_layer": True},
        {"num_heads": 4, "min_heads": 0},
        {"num_heads": 1, "per_layer": True},
    ],
    ids=str,
)
def test_layers_that_share_a_bias_lose_the_same_heads(model_type: str, options: dict) -> None:
    """Two heads in each pair of layers: the means over the layers decide, and each head counts twice."""
    model = small_model(model_type)
    pairs = [(0, 1), (2, 3), (4, 5)] if model_type == "t5" else [(0, 1)]
    scores = torch.rand(2 * len(pairs), 4, generator=torch.Generator().manual_seed(1))
    chosen = select_heads(scores, model=model, **options)
    means = torch.stack([scores[list(pair)].mean(0) for pair in pairs])
    if options.get("per_layer"):
        want = {layer: [int(mean.argmin())] for pair, mean in zip(pairs, means, strict=True) for layer in pair}
    else:
        number = {"t5": {"fraction": 6, "num_heads": 2}, "mpnet": {"fraction": 2, "num_heads": 2}}[model_type]
        order = [divmod(int(i), 4) for i in means.flatten().argsort()]
        taken = order[: next(value for name, value in number.items() if name in options)]
        want = {}
        for pair, head in sorted(taken):
            for layer in pairs[pair]:
                want.setdefault(layer, []).append(head)
    assert chosen == want
    prune_heads(model, chosen)  # accepted


def test_a_mask_search_of_layers_that_share_a_bias() -> None:
    model = small_model("mpnet")
    gradients = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    found = rearrange_heads(gradients, {0: [0, 1], 1: [0, 1]}, model=model)
    blocks = sum(rows.T @ rows for rows in gradients.unbind(1))
    costs = {pair: float(blocks[list(pair)][:, list(pair)].sum()) for pair in itertools.combinations(range(4), 2)}
    best = min(costs, key=lambda pair: costs[pair])
    assert found == {0: list(best), 1: list(best)}
    with pytest.raises(ValueError, match=r"layers \[0, 1\] share a bias .* same heads: \[\[0\], \[1\]\]"):
        rearrange_heads(gradients, {0: [0], 1: [1]}, model=model)


def test_groups_of_layers_that_share_a_bias() -> None:
    """The groups of one layer are larger than those of the other: heads go in the larger ones."""
    model = small_model("t5")
    convert_to_gqa(model, [2, 4, 4, 4, 4, 4])
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    scores[:2] -= 1
    found = select_heads(scores, model=model, num_heads=4)
    assert found in ({0: heads, 1: heads} for heads in ([0, 1], [2, 3]))
    prune_heads(copy.deepcopy(model), found)
    with pytest.raises(ValueError, match=r"layers 0, 1 share a bias .* groups of \[1, 2\] heads"):
        select_heads(scores, model=model, num_heads=4, groups="across")
    with pytest.raises(ValueError, match=r"3 heads cannot be removed from the model.*the same ones in layers that"):
        select_heads(scores, model=model, num_heads=3)


def test_scores_that_are_all_nan_are_refused() -> None:
    with pytest.raises(ValueError, match=r"importance \(2, 3\) is NaN everywhere.*the score went wrong"):
        select_heads(torch.full((2, 3), NAN), fraction=0.5)


def test_groups_of_a_model_that_never_calls_the_interface() -> None:
    """Falcon's four query heads share two key/value heads, which no call shows."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
                          new_decoder_architecture=True, eos_token_id=2)  # fmt: skip
    model = FalconModel(config).eval()
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.5, 0.6, 0.7, 0.8]])
    chosen = select_heads(scores, num_heads=2, model=model)
    assert chosen == {0: [2, 3]}
    prune_heads(model, chosen)


def test_heads_that_nothing_shows_are_left_out() -> None:
    """SigLIP pools its patches by PyTorch's `nn.MultiheadAttention`."""
    model = small_model("siglip_vision_model")
    batch = dict(discover(model).inputs)
    for method in ("entropy", "contribution", "magnitude"):
        with pytest.warns(UserWarning, match=r"head.attention.*their scores are NaN"):
            scores = head_importance(model, [batch], method=method)
        assert scores.isnan().sum(1).tolist() == [0, 0, 4]
    chosen = select_heads(scores, fraction=0.5, model=model)
    assert sum(map(len, chosen.values())) == 4 and 2 not in chosen
    prune_heads(model, chosen)
