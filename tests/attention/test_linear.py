"""Linear attention with Hedgehog features, a softmax window and a recurrent state, against its definition in float64.

Plain features without a window also run through the tests that all implementations share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate, assert_exact64, gradients
from support.reference import hedgehog, hybrid, phi
from torch import Tensor, nn

from hf_attnkit.attention.kernels import linear_sums
from hf_attnkit.attention.kinds import linear
from hf_attnkit.attention.kinds.linear import LinearState
from hf_attnkit.attention.mask import Mask

SCALING = 0.3
OPTIONS: list[dict[str, Any]] = [
    {"feature_map": "elu", "window": 5},
    {"feature_map": "hedgehog"},
    {"feature_map": "hedgehog", "window": 1},
    {"feature_map": "hedgehog", "window": 7},
    {"feature_map": "hedgehog", "window": 1000},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['feature_map']}-{o.get('window')}")
both_ways = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments and chunks in a short text; the sizes divide nothing."""
    monkeypatch.setattr(linear_sums, "SEGMENT", 24)
    monkeypatch.setattr(linear_sums, "CHUNK", 7)


def inputs(heads: int, kv_heads: int, queries: int, keys: int, dim: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, queries, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, dim))
    return [1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def maps(heads: int, kv_heads: int, dim: int = 6) -> list[Tensor]:
    """Weights and biases of a trained-looking Hedgehog module, in the order of its `parameters()`."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((heads, dim, dim), (heads, dim), (kv_heads, dim, dim), (kv_heads, dim))
    return [0.6 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def padding(kind: str, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[1, slice(0, keys // 3) if kind == "left" else slice(keys - keys // 3, None)] = False
    return seen


def run(options: dict[str, Any], mask: Mask, query: Tensor, key: Tensor, value: Tensor, *learned: Tensor, **more: Any):
    """The library's output; `learned` as from `maps`."""
    parameters = None
    if options["feature_map"] == "hedgehog":
        parameters = linear.create_parameters(query.shape[1], key.shape[1], query.shape[3], **options)
        for name, tensor in zip(("query.weight", "query.bias", "key.weight", "key.bias"), learned, strict=True):
            module = parameters.get_submodule(name.split(".")[0])
            del module._parameters[name.split(".")[1]]
            setattr(module, name.split(".")[1], tensor)  # a plain tensor, so that its gradient is asked for
    arguments = {"scaling": SCALING} | options | more
    return linear.attention(query, key, value, mask, parameters=parameters, **arguments)[0]


def expected(
    options: dict[str, Any], mask: Mask, query: Tensor, key: Tensor, value: Tensor, *learned: Tensor, **more: Any
) -> Tensor:
    distance = mask.query_position[:, None, :, None] - mask.key_position[:, None, None, :]
    visible = distance >= 0 if mask.is_causal else distance == distance
    if mask.key_visible is not None:
        visible = visible & mask.key_visible[:, None, None, :]
    phis = {"phi_query": phi, "phi_key": phi}
    if learned:
        phis["phi_query"] = lambda x: hedgehog(x, *learned[:2])
        phis["phi_key"] = lambda x: hedgehog(x, *learned[2:])
    near = distance.abs() < options.get("window", 0)
    return hybrid(query, key, value, visible, near, scaling=SCALING, **phis, **more)


def learned_for(options: dict[str, Any], heads: int, kv_heads: int, dim: int = 6) -> list[Tensor]:
    return maps(heads, kv_heads, dim) if options["feature_map"] == "hedgehog" else []


def compare(options: dict[str, Any], mask: Mask, tensors: Sequence[Tensor]) -> None:
    """Outputs, and gradients with respect to queries, keys, values and the maps."""
    got = gradients(partial(run, options, mask), *tensors)
    want = gradients(partial(expected, options, mask), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=2 * tensors[1].shape[2])


@both_ways
@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("length", [1, 2, 7, 25, 61])
@every_option
def test_lengths(options: dict[str, Any], length: int, kind: str, is_causal: bool) -> None:
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=padding(kind, length))
    compare(options, mask, [*inputs(6, 3, length, length), *learned_for(options, 6, 3)])


@both_ways
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@every_option
def test_groupings(options: dict[str, Any], heads: tuple[int, int], is_causal: bool) -> None:
    mask = Mask.aligned(30, 30, is_causal=is_causal, key_visible=padding("left", 30))
    compare(options, mask, [*inputs(*heads, 30, 30), *learned_for(options, *heads)])


@both_ways
@pytest.mark.parametrize("placing", [(0, 7, 40), (9, 1, 40), (39, 1, 40), (9, 31, 70), (60, 40, 100)], ids=str)
@every_option
def test_queries_anywhere(options: dict[str, Any], placing: tuple[int, int, int], is_causal: bool) -> None:
    """Keys before the queries (a cache) and behind them (empty slots of a StaticCache)."""
    offset, queries, keys = placing
    positions = torch.arange(offset, offset + queries)[None], torch.arange(keys)[None]
    mask = Mask(*positions, is_causal=is_causal, key_visible=padding("left", keys))
    compare(options, mask, [*inputs(4, 2, queries, keys), *learned_for(options, 4, 2)])


@both_ways
@every_option
def test_queries_that_see_nothing(options: dict[str, Any], is_causal: bool) -> None:
    """They give exactly 0, and gradients stay finite and away from them."""
    seen = torch.ones(2, 40, dtype=torch.bool)
    seen[1] = False
    seen[0, :10] = False
    mask = Mask.aligned(40, 40, is_causal=is_causal, key_visible=seen)
    tensors = inputs(4, 2, 40, 40)
    output, *grads = gradients(partial(run, options, mask), *tensors, *learned_for(options, 4, 2))
    assert not output[1].any() and output[0, :, 10:].all()
    assert not is_causal or not output[0, :, :10].any()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert all(grad[0].any() and not grad[1].any() for grad in grads[:3])


# Generation: a state in the place of the cache.


def generate(options: dict[str, Any], sizes: Sequence[int], seen: Tensor | None, tensors: list[Tensor]) -> tuple:
    """Outputs of one call after the other, of `sizes` tokens each, and the state left behind."""
    query, key, value, *learned = tensors
    state, outputs, start = LinearState(), [], 0
    for size in sizes:
        stop = start + size
        given = slice(max(0, start - max(options.get("window", 1) - 1, 0)), stop)
        visible = None if seen is None else seen[:, given]
        # As a model does: one new token has no future to hide.
        mask = Mask.aligned(size, stop - given.start, is_causal=size > 1, key_visible=visible)
        parts = query[:, :, start:stop], key[:, :, given], value[:, :, given]
        outputs.append(run(options, mask, *parts, *learned, cache=state))
        start = stop
    assert start == query.shape[2]
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize(
    "sizes", [[1] * 50, [50], [20, 30], [3, 1, 1, 25, 20], [26] + [1] * 24], ids=lambda s: str(s[:3])
)
@pytest.mark.parametrize("options", [{"feature_map": "elu"}, *OPTIONS], ids=str)
def test_any_split_is_one_pass(options: dict[str, Any], sizes: list[int], kind: str) -> None:
    tensors = [*inputs(4, 2, 50, 50), *learned_for(options, 4, 2)]
    seen = padding(kind, 50)
    mask = Mask.aligned(50, 50, is_causal=True, key_visible=seen)
    outputs, state = generate(options, sizes, seen, tensors)
    assert_exact64(outputs, expected(options, mask, *tensors), terms=100)

    # What is left: every real key that the next token has outside its window.
    last = min(50, max(0, 51 - options.get("window", 1)))
    keys = hedgehog(tensors[1], *tensors[5:]) if tensors[3:] else phi(tensors[1])
    keys = keys if seen is None else keys * seen[:, None, :, None]
    values = torch.cat([tensors[2], torch.ones_like(tensors[2][..., :1])], dim=-1)
    sums = torch.einsum("bgkf,bgkd->bgfd", keys[:, :, :last], values[:, :, :last])
    assert_exact64(state.sums, sums, terms=50)


def test_gradients_pass_through_the_state() -> None:
    tensors = [*inputs(4, 2, 30, 30), *maps(4, 2)]
    options = {"feature_map": "hedgehog", "window": 4}
    got = gradients(lambda *t: generate(options, [11, 1, 18], None, list(t))[0], *tensors)
    want = gradients(partial(expected, options, Mask.aligned(30, 30, is_causal=True)), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=60)


@pytest.mark.parametrize("window", [None, 4])
def test_the_state_has_one_size(window: int | None) -> None:
    options = {"feature_map": "hedgehog"} | ({} if window is None else {"window": window})
    for length in (5, 80):
        tensors = [x.float() for x in (*inputs(4, 2, length, length), *maps(4, 2))]
        _, state = generate(options, [length - 1, 1], None, tensors)
        assert state.sums.shape == (2, 2, 12, 7) and state.sums.dtype == torch.float32
        half = [x.bfloat16() for x in tensors]
        assert generate(options, [length], None, half)[1].sums.dtype == torch.float32


@pytest.mark.parametrize("window", [None, 16])
def test_a_step_maps_one_key(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step of generation costs does not depend on the text or the window."""
    options = {"feature_map": "elu"} | ({} if window is None else {"window": window})
    tensors = inputs(2, 2, 60, 60)
    _, state = generate(options, [60], None, tensors)
    mapped = []
    original = linear.feature_maps.elu
    monkeypatch.setattr(linear.feature_maps, "elu", lambda x: mapped.append(x.shape[2]) or original(x))
    given = (window or 1) - 1
    query, key, value = inputs(2, 2, 1, given + 1)
    run(options, Mask.aligned(1, given + 1, is_causal=False), query, key, value, cache=state)
    assert sum(mapped) == 2  # the query, and the key that is new or leaves the window


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    groups, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    options = {"feature_map": draw(st.sampled_from(["elu", "hedgehog"]))}
    if window := draw(st.sampled_from([0, 1, 2, 3, 10, 39, 100])):
        options["window"] = window
    length = sum(sizes)
    seen = torch.ones(2, length, dtype=torch.bool)
    seen[0, : draw(st.integers(0, length))] = False
    seen[1, length - draw(st.integers(0, length)) :] = False
    tensors = inputs(groups * group, groups, length, length, dim=4, seed=draw(st.integers(0, 1000)))
    tensors += learned_for(options, groups * group, groups, 4)
    return options, sizes, seen, tensors


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 30), st.integers(1, 50))
def test_any_problem(problem: tuple, chunk: int, segment: int) -> None:
    options, sizes, seen, tensors = problem
    length = sum(sizes)
    before = linear_sums.CHUNK, linear_sums.SEGMENT
    try:
        linear_sums.CHUNK, linear_sums.SEGMENT = chunk, segment
        for is_causal in (True, False):
            compare(options, Mask.aligned(length, length, is_causal=is_causal, key_visible=seen), tensors)
        whole = expected(options, Mask.aligned(length, length, is_causal=True, key_visible=seen), *tensors)
        assert_exact64(generate(options, sizes, seen, tensors)[0], whole, terms=2 * length)
    finally:
        linear_sums.CHUNK, linear_sums.SEGMENT = before


# Precision.


@both_ways
@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_option
def test_error_against_float64(options: dict[str, Any], dtype: torch.dtype, scale: float, is_causal: bool) -> None:
    """At most twice the error of the definition computed in the same precision; its e^s must fit float16."""
    tensors = [(scale * x).to(dtype) for x in inputs(6, 3, 90, 90)] + [x.to(dtype) for x in learned_for(options, 6, 3)]
    mask = Mask.aligned(90, 90, is_causal=is_causal, key_visible=padding("left", 90))
    ours = gradients(partial(run, options, mask), *tensors)
    theirs = gradients(partial(expected, options, mask), *tensors)
    exact = gradients(partial(expected, options, mask), *(x.double() for x in tensors))
    for actual, plain, truth in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(actual, plain, truth, terms=12)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_option
def test_large_scores(options: dict[str, Any], dtype: torch.dtype, is_causal: bool) -> None:
    """Scores near 1,000, features near 0 and hidden rows: finite, gradients too."""
    tensors = [(25 * x).to(dtype) for x in inputs(4, 2, 60, 60)] + [x.to(dtype) for x in learned_for(options, 4, 2)]
    seen = padding("left", 60)
    seen[0] = False
    mask = Mask.aligned(60, 60, is_causal=is_causal, key_visible=seen)
    for result in gradients(partial(run, options, mask), *tensors):
        assert result.dtype == dtype and torch.isfinite(result).all()


def test_very_negative_scores_in_a_window() -> None:
    """All e^s below the smallest float, and no key beyond the window: still the softmax of the window."""
    query, key, value = (x.float() for x in inputs(1, 1, 4, 4))
    query, key = torch.full_like(query, 20.0), torch.full_like(key, -20.0)
    output = run({"feature_map": "elu", "window": 4}, Mask.aligned(4, 4, is_causal=True), query, key, value)
    means = value.cumsum(2) / torch.arange(1, 5)[:, None]
    assert (output - means).abs().max() <= 4 * torch.finfo(torch.float32).eps * value.abs().max()


def test_a_normaliser_too_small_to_divide_by() -> None:
    """Features whose products leave float32: no key, rather than infinite gradients."""
    query, key, value = (x.float() for x in inputs(1, 1, 4, 4))
    query, key = torch.full_like(query, -50.0), torch.full_like(key, -45.0)
    mask = Mask.aligned(4, 4, is_causal=True)
    output, *grads = gradients(partial(run, {"feature_map": "elu"}, mask), query, key, value)
    assert not output.any() and all(torch.isfinite(grad).all() for grad in grads)


def test_elu_keeps_small_features() -> None:
    """e^x of a negative x to all digits, which elu(x) + 1 in float32 has lost at -20."""
    x = torch.linspace(-60, 5, 200)
    features = linear.feature_maps.elu(x).double()
    assert ((features - phi(x.double())) / phi(x.double())).abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("options", [{"feature_map": "elu"}, *OPTIONS[:2]], ids=str)
def test_mixed_precision_keeps_the_sums_in_float32(options: dict[str, Any]) -> None:
    tensors = [x.bfloat16().float() for x in (*inputs(4, 2, 60, 60), *learned_for(options, 4, 2))]
    mask = Mask.aligned(60, 60, is_causal=True)
    query, key, value, *learned = tensors
    state, plain_state = LinearState(), LinearState()
    run(options, mask, query, key, value, *learned, cache=plain_state)
    with torch.autocast("cpu", torch.bfloat16):
        run(options, mask, query, key, value, *learned, cache=state)
    assert torch.equal(state.sums, plain_state.sums)


# Dropout.


@every_option
def test_dropout_mean_is_the_undropped_output(options: dict[str, Any]) -> None:
    """The largest of 320 deviations stays below 5 standard errors but once in 5,000 suites (seed fixed)."""
    tensors = [*inputs(2, 1, 10, 10, dim=4), *learned_for(options, 2, 1, 4)]
    mask = Mask.aligned(10, 10, is_causal=True, key_visible=padding("left", 10))
    draws = torch.stack([run(options, mask, *tensors, dropout=0.3) for _ in range(600)])
    exact = expected(options, mask, *tensors)
    bound = 5 * draws.std(0) / 600**0.5
    assert ((draws.mean(0) - exact).abs() <= bound + 1e-12).all()
    assert bound[exact.abs() > 0.1].mean() < 0.3 * exact.abs()[exact.abs() > 0.1].mean()  # the bound means something


@both_ways
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog"])
def test_dropout_drops_far_values_for_all_queries_and_near_weights_one_by_one(
    feature_map: str, is_causal: bool
) -> None:
    """With one-hot values the output is the dropped weight: 0, or the undropped one over 1 - p."""
    length, p, window = 50, 0.4, 6
    options = {"feature_map": feature_map, "window": window}
    query, key, _ = inputs(2, 1, length, length)
    value = torch.eye(length, dtype=torch.float64).expand(2, 1, length, length)
    mask = Mask.aligned(length, length, is_causal=is_causal)
    tensors = [query, key, value, *learned_for(options, 2, 1)]
    whole = run(options, mask, *tensors)
    ratio = run(options, mask, *tensors, dropout=p) / torch.where(whole > 0, whole, 1.0)
    kept = ratio > 0.5
    # 1 / (1 - p) is made in float32.
    assert ((ratio - kept / (1 - p)).abs() < 1e-6).all()

    distance = torch.arange(length)[:, None] - torch.arange(length)
    near, far = distance.abs() < window, distance >= window
    far = far if is_causal else far | (distance <= -window)
    near = near & (distance >= 0) if is_causal else near
    columns = [kept[:, :, far[:, j], j].flatten(1) for j in range(length) if far[:, j].any()]
    # One draw for all queries and heads of a column, another for each row of the batch.
    assert all((column == column[:, :1]).all() for column in columns)
    draws = torch.stack([column[:, 0] for column in columns]).double()
    assert abs(draws.mean() - (1 - p)) <= 5 * (p * (1 - p) / draws.numel()) ** 0.5
    draws = kept[:, :, near].double()
    assert abs(draws.mean() - (1 - p)) <= 5 * (p * (1 - p) / draws.numel()) ** 0.5
    assert draws.std(-1).min() > 0


@both_ways
def test_dropout_backward_uses_the_forward_factors(is_causal: bool) -> None:
    """Finite differences under a fixed seed."""
    options = {"feature_map": "hedgehog", "window": 3}
    mask = Mask.aligned(9, 9, is_causal=is_causal)
    tensors = [x.requires_grad_() for x in (*inputs(2, 1, 9, 9, dim=3), *maps(2, 1, 3))]

    def fixed(*leaves: Tensor) -> Tensor:
        torch.manual_seed(5)
        return run(options, mask, *leaves, dropout=0.3)

    assert torch.autograd.gradcheck(fixed, tensors)


# Memory.


@every_option
def test_nothing_quadratic_is_kept_for_the_backward_pass(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the tokens, at most four times the numbers saved, and what does not grow."""
    monkeypatch.setattr(linear_sums, "SEGMENT", 64)
    monkeypatch.setattr(linear_sums, "CHUNK", 16)
    saved = []
    for length in (256, 1024):
        tensors = [x.requires_grad_() for x in (*inputs(2, 1, length, length), *learned_for(options, 2, 1))]
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run(options, Mask.aligned(length, length, is_causal=True), *tensors)
        saved.append(sum(storages.values()))
        del output
    assert saved[1] <= 4.2 * saved[0]


# Parameters, options and refusals.


def test_parameters_start_as_the_identity() -> None:
    assert linear.create_parameters(4, 2, 8, feature_map="elu", window=None) is None
    module = linear.create_parameters(4, 2, 8, feature_map="hedgehog", window=3)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {"query.weight": (4, 8, 8), "query.bias": (4, 8), "key.weight": (2, 8, 8), "key.bias": (2, 8)}
    assert isinstance(module, nn.Module) and all(parameter.requires_grad for parameter in module.parameters())
    x = torch.randn(3, 4, 5, 8)
    assert torch.allclose(module.query(x), torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1), atol=1e-6)


def test_parameters_load_and_run_in_half_precision() -> None:
    module = linear.create_parameters(4, 2, 6, feature_map="hedgehog")
    with torch.no_grad():
        for parameter, tensor in zip(module.parameters(), maps(4, 2), strict=True):
            parameter.copy_(tensor)
    again = linear.create_parameters(4, 2, 6, feature_map="hedgehog")
    again.load_state_dict(module.state_dict())
    tensors = [x.bfloat16() for x in inputs(4, 2, 20, 20)]
    mask = Mask.aligned(20, 20, is_causal=True)
    results = [
        linear.attention(*tensors, mask, scaling=1.0, feature_map="hedgehog", parameters=m)[0] for m in (module, again)
    ]
    assert torch.equal(*results) and results[0].dtype == torch.bfloat16
    half = linear.attention(*tensors, mask, scaling=1.0, feature_map="hedgehog", parameters=again.bfloat16())[0]
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "relu"}, r"feature_map='relu' must be one of 'elu', 'hedgehog'"),
        ({"feature_map": None}, r"feature_map=None must be one of"),
        ({"window": 0}, r"window=0 must be an integer of at least 1"),
        ({"window": True}, r"window=True must be an integer"),
        ({"window": 2.0}, r"window=2\.0 must be an integer"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear.check(4, 2, **options)


def test_options_accepted() -> None:
    linear.check(4, 2)
    for options in OPTIONS:
        linear.check(4, 2, **options)


def test_bias_refused() -> None:
    mask = Mask.receive(torch.zeros(1, 1, 5, 5), 5, 5, is_causal=False, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"cannot add an attention bias .* use 'mha' or 'gqa'"):
        run({"feature_map": "elu"}, mask, *inputs(2, 2, 5, 5))


def test_missing_and_foreign_parameters_refused() -> None:
    mask, tensors = Mask.aligned(5, 5, is_causal=True), inputs(4, 2, 5, 5)
    with pytest.raises(ValueError, match=r"parameters=None; pass the module of linear\.create_parameters"):
        linear.attention(*tensors, mask, scaling=1.0, feature_map="hedgehog")
    other = linear.create_parameters(8, 2, 6, feature_map="hedgehog")
    with pytest.raises(ValueError, match="made for 8 heads of size 6 and got 4 heads of size 6"):
        linear.attention(*tensors, mask, scaling=1.0, feature_map="hedgehog", parameters=other)


@pytest.mark.parametrize(
    ("window", "queries", "keys", "is_causal", "message"),
    [
        (None, 2, 3, True, r"3 keys for 2 queries: .* at most 0 kept"),
        (4, 2, 6, True, r"6 keys for 2 queries: .* at most 3 kept"),
        (4, 3, 2, True, r"2 keys for 3 queries"),
        (None, 3, 3, False, r"a state with 3 bidirectional queries"),
    ],
)
def test_state_refused(window: int | None, queries: int, keys: int, is_causal: bool, message: str) -> None:
    state = LinearState()
    options = {"feature_map": "elu", "window": window}
    with pytest.raises(ValueError, match=message):
        mask = Mask.aligned(queries, keys, is_causal=is_causal)
        run(options, mask, *inputs(2, 2, queries, keys), cache=state)
    assert state.sums is None
