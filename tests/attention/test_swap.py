"""Every implementation in every real model class: outputs and gradients equal attention as defined.

Three runs: the swapped model, the same model with plain attention in the same precision, and that in
float64. Plain attention is stock SDPA for exact kinds, else `plain_attention`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from support import plain_attention
from support.accuracy import assert_as_accurate
from support.matrix import EXACT, LONG, MATRIX, WITH_FAMILY, kind
from support.models import DECODERS, EVERY_HEAD, batch, build, outputs
from support.swapping import TERMS, build_for, layer_of, results, swapped
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import restore_attention, swap_attention
from hf_attnkit.models.layers import attention_layers


def precise(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The float64 run, with SDPA: eager attention of padding overflows in float64."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("sdpa")
    return outputs(model, inputs).detach()


def assert_equal_models(ours: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """A parameter's gradient may be small because terms of the size of its layer's largest cancel
    (a key bias adds the same to all scores of a query: its gradient is 0): that size sets the floor."""
    assert ours.keys() == plain.keys() == exact.keys()
    largest: dict[str, float] = defaultdict(float)
    for name, value in exact.items():
        largest[layer_of(name)] = max(largest[layer_of(name)], value.abs().max().item())
    for name in ours:
        assert_as_accurate(ours[name], plain[name], exact[name], terms=TERMS, magnitude=largest[layer_of(name)])


def check(name: str, model: PreTrainedModel, inputs: dict[str, Tensor], options: dict[str, Any], stock: str) -> None:
    ours = swapped(model, name, **options)
    model.set_attn_implementation(stock)
    precise = copy.deepcopy(model).double()
    # float64 parameters, but norms and rotary embeddings of Transformers stay in float32: the exact
    # run is off by one rounding there, as every other.
    assert_equal_models(results(ours, inputs), results(model, inputs), results(precise, inputs))


@pytest.mark.parametrize(
    ("name", "family", "head"),
    [(name, family, head) for name, family in WITH_FAMILY for of, head in EVERY_HEAD if of == family],
)
def test_every_head_type(name: str, family: str, head: str) -> None:
    model = build_for(name, family, head)
    stock = "sdpa" if name in EXACT else plain_attention.register(name)
    check(name, model, batch(model), MATRIX[name].options, stock)


@pytest.mark.parametrize("family", ["bert", *DECODERS])
@pytest.mark.parametrize("name", LONG)
def test_windows_longer_than_the_sequence_are_exact(name: str, family: str) -> None:
    model = build_for(name, family)
    check(name, model, batch(model), LONG[name], "sdpa")


@pytest.mark.parametrize(("name", "family"), WITH_FAMILY)
def test_without_a_mask(name: str, family: str) -> None:
    model = build_for(name, family)
    ours = outputs_without_mask(swapped(model, name, **MATRIX[name].options))
    model.set_attn_implementation("sdpa" if name in EXACT else plain_attention.register(name))
    plain, exact = outputs_without_mask(model), outputs_without_mask(model.double())
    assert_as_accurate(ours, plain, exact, terms=TERMS)


def outputs_without_mask(model: PreTrainedModel) -> Tensor:
    return model(batch(model, (40, 40))["input_ids"]).last_hidden_state.detach()


@pytest.mark.parametrize("name", list(MATRIX))
def test_bidirectional_decoder(name: str) -> None:
    """`config.is_causal = False` makes an encoder of a Llama, as embedding models do."""
    model = build_for(name, "llama")
    model.config.is_causal = False
    check(name, model, batch(model), MATRIX[name].options, "sdpa" if name in EXACT else plain_attention.register(name))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", EXACT)
def test_mask_made_by_the_user(name: str, kind: str) -> None:
    """A 4-D mask with an arbitrary pattern."""
    model = build_for(name, "llama")
    inputs = batch(model, (12, 12))
    mask = torch.rand(2, 1, 12, 12) < 0.5
    mask |= torch.eye(12, dtype=torch.bool)
    if kind == "float":
        mask = torch.zeros(2, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours = swapped(model, name)

    def run(model: PreTrainedModel, mask: Tensor) -> Tensor:
        return model(inputs["input_ids"], attention_mask=mask).last_hidden_state.detach()

    plain = run(model, mask)
    precise = mask.double().clamp(min=torch.finfo(torch.float64).min) if kind == "float" else mask
    exact = run(copy.deepcopy(model).double(), precise)
    assert_as_accurate(run(ours, mask), plain, exact, terms=TERMS)


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [[0], [0, 1]], ids=["one layer", "all layers"])
def test_bias_made_by_the_user(layers: list[int], stock: str) -> None:
    """A float mask that also weighs keys (ALiBi, say) reaches swapped and unswapped layers alike."""
    model = build("llama", "base", 8, 2)
    model.set_attn_implementation(stock)
    ids = batch(model, (12, 12))["input_ids"]
    distance = torch.arange(12)[:, None] - torch.arange(12)
    mask = (-0.3 * distance).masked_fill(distance < 0, torch.finfo(torch.float32).min).expand(2, 1, 12, 12)

    def run(model: PreTrainedModel, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask).last_hidden_state.detach()

    ours, plain = run(swapped(model, "flash", layers=layers), mask), run(model, mask)
    exact = run(copy.deepcopy(model).double(), mask.double())
    assert_as_accurate(ours, plain, exact, terms=TERMS)
    assert (plain - run(model, torch.where(mask < -100, mask, 0.0))).abs().max() > 0.1


@pytest.mark.parametrize(("argument", "value"), [("softcap", 30.0), ("s_aux", torch.zeros(8))])
def test_arguments_of_scores_are_refused_without_scores(argument: str, value: Any) -> None:
    model = swapped(build("bert"), "linear")
    with pytest.raises(ValueError, match=f"BertSelfAttention passes '{argument}', .*'linear' attention forms none"):
        model(**batch(model), **{argument: value})


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", [*EXACT, *LONG])
def test_packed_sequences(name: str, family: str) -> None:
    """Position ids that restart separate texts; a window must not cross them either."""
    model = build_for(name, family)
    options = LONG.get(name, {})
    ids = batch(model, (17, 17))["input_ids"]
    # Transformers looks for restarting positions only where no cache could continue them.
    model.config.use_cache = False
    positions = torch.cat([torch.arange(7), torch.arange(10)]).expand(2, -1)

    def run(model: PreTrainedModel) -> Tensor:
        return model(ids, position_ids=positions).last_hidden_state.detach()

    ours = run(swapped(model, name, **options))
    apart = torch.cat([model(ids[:, :7]).last_hidden_state, model(ids[:, 7:]).last_hidden_state], dim=1).detach()
    plain, exact = run(model), run(copy.deepcopy(model).double())
    assert_as_accurate(apart, plain, exact, terms=TERMS)  # stock separates them
    assert_as_accurate(ours, plain, exact, terms=TERMS)


def test_linear_refuses_a_matrix_of_the_user() -> None:
    model = swapped(build("llama"), "linear")
    apart = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).tril().bool()[None, None]
    with pytest.raises(ValueError, match="give packed rows as position_ids that restart"):
        model(torch.ones(1, 5, dtype=torch.long), attention_mask=apart, use_cache=False)


@pytest.mark.parametrize("name", [*EXACT, "sliding_window"])
def test_window_of_the_model_itself(name: str) -> None:
    """A Mistral with a sliding window keeps it under every kind; a smaller window of ours adds to it."""
    model = build_for(name, "mistral", "causal", sliding_window=8)
    inputs = batch(model, (20, 13))
    options = {"window": 5} if name == "sliding_window" else {}
    ours = swapped(model, name, **options)
    if options:
        model = build_for(name, "mistral", "causal", sliding_window=5)
    plain, exact = outputs(model, inputs), outputs(copy.deepcopy(model).double(), inputs)
    assert_as_accurate(outputs(ours, inputs).detach(), plain.detach(), exact.detach(), terms=TERMS)


def test_global_tokens_given_with_the_call() -> None:
    """`global_attention_mask` reaches the attention of BERT: with all tokens global it is stock."""
    model = build("bert")
    inputs = batch(model)
    ours = swapped(model, "local_global", window=1, num_global_tokens=0)
    plain, exact = outputs(model, inputs), outputs(copy.deepcopy(model).double(), inputs)
    marked = torch.ones_like(inputs["input_ids"])
    actual = outputs(ours, inputs, global_attention_mask=marked)
    assert_as_accurate(actual.detach(), plain.detach(), exact.detach(), terms=TERMS)
    assert (outputs(ours, inputs) - plain).abs().max() > 0.1


@pytest.mark.parametrize("family", ["bert", *DECODERS])
@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_layers_that_are_not_swapped_keep_what_they_run(family: str, stock: str) -> None:
    """Some layers swapped, then others with another kind; a padded batch."""
    model = build(family, num_hidden_layers=4)
    model.set_attn_implementation(stock)
    inputs = batch(model)
    plain, exact = outputs(model, inputs), precise(model, inputs)
    ours = swapped(model, "flash", layers=[1])
    assert_as_accurate(outputs(ours, inputs).detach(), plain.detach(), exact.detach(), terms=TERMS)
    swap_attention(ours, {3: "mha", 2: ("local_global", {"window": 100})})
    assert_as_accurate(outputs(ours, inputs).detach(), plain.detach(), exact.detach(), terms=TERMS)
    assert ours.config.hf_attnkit["base"] == stock
    paths = [layer.saved_as for layer in attention_layers(ours)]
    assert {path: kind[0] for path, kind in ours.config.hf_attnkit["layers"].items()} == {
        paths[1]: "flash",
        paths[2]: "local_global",
        paths[3]: "mha",
    }


def test_a_mapping_gives_each_layer_its_kind() -> None:
    """Layer 0 with a window and layer 1 whole: hidden states after layer 0 equal a fully windowed model's."""
    model = build("llama", "base", 8, 2)
    inputs = batch(model)
    mixed = swapped(model, {0: ("sliding_window", {"window": 3}), 1: "gqa"})
    windowed = swapped(model, "sliding_window", window=3)
    hidden = [m(**inputs, output_hidden_states=True).hidden_states for m in (mixed, windowed, model)]
    assert torch.equal(hidden[0][1], hidden[1][1])
    real = inputs["attention_mask"].bool()
    assert not torch.allclose(hidden[0][2][real], hidden[1][2][real])
    assert not torch.allclose(hidden[0][1][real], hidden[2][1][real])


def test_a_later_swap_replaces_an_earlier_one() -> None:
    model = build("llama", "base", 8, 2)
    inputs = batch(model)
    twice = swap_attention(swapped(model, "sliding_window", window=2), "gqa")
    assert torch.equal(outputs(twice, inputs), outputs(swapped(model, "gqa"), inputs))


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_restore_leaves_no_trace(family: str, stock: str) -> None:
    model = build(family)
    model.set_attn_implementation(stock)
    inputs = batch(model)
    before = outputs(model, inputs)
    config, state = model.config.to_json_string(use_diff=False), dict(model.config.__dict__)
    keys = [set(module.__dict__) for module in model.modules()]
    swap_attention(model, "sliding_window", window=2)
    swap_attention(model, "flash", layers=[0])
    assert not torch.equal(outputs(model, inputs), before)
    assert restore_attention(model) is model
    assert torch.equal(outputs(model, inputs), before)
    assert model.config.to_json_string(use_diff=False) == config
    assert model.config.__dict__ == state
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert model.config._attn_implementation == stock


def test_swap_is_in_place_and_keeps_modes() -> None:
    model = build("bert")
    model.encoder.layer[0].train()
    before = [module.training for module in model.modules()]
    assert swap_attention(model, "flash") is model
    assert [module.training for module in model.modules()] == before


def test_linear_warns_that_it_needs_training() -> None:
    with pytest.warns(UserWarning, match="useless output until it is trained") as warned:
        swap_attention(build("llama"), "linear")
    assert warned[0].filename == __file__  # the line to look at is the caller's


@pytest.mark.parametrize("name", list(MATRIX))
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = swapped(build_for(name, "llama"), name, **MATRIX[name].options).train()
    inputs = batch(model)
    plain = results(model, inputs, use_cache=False)  # checkpointing forbids a cache, whose keys lie otherwise in memory
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = results(model, inputs, use_cache=False)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_attention_weights(family: str) -> None:
    """`mha` returns eager attention's weights; kinds that form none say so."""
    model = build(family)
    inputs = batch(model)
    if family in DECODERS:  # right padding: every causal query sees a key, so that eager attention is defined
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    ours = swapped(model, "mha")(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    plain = model(**inputs, output_attentions=True).attentions
    exact = copy.deepcopy(model).double()(**inputs, output_attentions=True).attentions
    assert len(ours) == len(plain) == 2
    for actual, stock, truth in zip(ours, plain, exact, strict=True):
        assert_as_accurate(actual.detach(), stock.detach(), truth.detach(), terms=TERMS)


@pytest.mark.parametrize("name", [name for name in MATRIX if name != "mha"])
@pytest.mark.parametrize("family", DECODERS)
def test_attention_weights_refused(name: str, family: str) -> None:
    model = swapped(build_for(name, family), name, **MATRIX[name].options)
    with pytest.raises(
        ValueError, match=f"'{kind(name)}' forms no attention weights; for output_attentions swap to 'mha'"
    ):
        model(**batch(model), output_attentions=True)


@pytest.mark.parametrize("name", [name for name in MATRIX if name not in ("mha", "mqa")])
def test_attention_weights_refused_by_bert(name: str) -> None:
    model = swapped(build("bert"), name, **MATRIX[name].options)
    with pytest.raises(ValueError, match="for output_attentions swap to 'mha'"):
        model(**batch(model), output_attentions=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model = swapped(build("llama", "causal", 8, 2), name)
    inputs = batch(model)
    expected = outputs(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = outputs(compiled, inputs)
    exact = outputs(copy.deepcopy(model).double(), inputs)
    assert_as_accurate(actual, expected.detach(), exact.detach(), terms=TERMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(MATRIX))
def test_low_precision_model(name: str, dtype: torch.dtype) -> None:
    model = build_for(name, "llama", "causal").to(dtype)
    inputs = batch(model)
    ours = outputs(swapped(model, name, **MATRIX[name].options), inputs).detach()
    model.set_attn_implementation("sdpa" if name in EXACT else plain_attention.register(name))
    exact = outputs(copy.deepcopy(model).double(), inputs).detach()
    if name in EXACT:
        model.set_attn_implementation("eager")
    assert_as_accurate(ours, outputs(model, inputs).detach(), exact, terms=TERMS)
