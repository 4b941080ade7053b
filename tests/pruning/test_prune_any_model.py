"""`prune_heads` of models that no table knows: outputs and gradients are those of the model with these heads zeroed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from support.any_model import TYPES, any_model, zeroed
from support.cutting import a_group
from support.every_type import small_model
from support.unchanged import unchanged
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DebertaConfig,
    DebertaModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from hf_attnkit import convert_to_gqa, last_change, load_pretrained, prune_heads, restore_attention, swap_attention
from hf_attnkit.attention.kind import KEPT
from hf_attnkit.models.discovery import Discovery, discover, run_outputs
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships
from hf_attnkit.models.tensors import cloned, tensors_in


def one_group(model: PreTrainedModel) -> tuple[Discovery, list[Ownership], dict[int, list[int]]]:
    """A group of heads of each attention."""
    found = discover(model)
    owned = ownerships(model, found.attentions)
    return found, owned, {i: a_group(each.num_heads, owned[i]) for i, each in enumerate(found.attentions)}


def loss(model: PreTrainedModel, found: Discovery) -> tuple[list[Tensor], Tensor]:
    """Outputs, and a random combination of them."""
    inputs = {
        name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in cloned(found.inputs).items()
    }
    outputs = tensors_in(model(**inputs))
    generator = torch.Generator().manual_seed(3)
    total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    assert isinstance(total, Tensor)
    return outputs, total


def runs_in_float64(model: PreTrainedModel) -> bool:
    """Experts have no kernel for float64, and eager attention takes its softmax in float32, where masks overflow."""
    return not hasattr(model.config, "num_experts_per_tok") and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", TYPES)
def test_outputs_and_gradients_are_the_zeroed_model_s(model_type: str) -> None:
    model = any_model(model_type)
    found, owned, heads = one_group(model)
    if runs_in_float64(model):
        model = model.double()
    tolerance = 1e-9 if model.dtype == torch.float64 else 1e-3
    whole = copy.deepcopy(model)
    prune_heads(model, heads)
    got, total = loss(model, found)
    total.backward()
    with zeroed(whole, found, owned, heads):
        want, total = loss(whole, found)
        total.backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (1 + float(b.abs().max())))
    old, cut = dict(whole.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        want_grad = old[name].grad
        assert want_grad is not None
        scale = float(want_grad.abs().max())
        if parameter.shape == want_grad.shape:
            torch.testing.assert_close(parameter.grad, want_grad, rtol=0, atol=10 * tolerance * (1 + scale))
        else:  # what is gone had no gradient
            cut += 1
            a, b = (grad.double().square().sum().sqrt() for grad in (parameter.grad, want_grad))
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)
    assert cut >= 4
    untouched, _ = loss(whole, found)
    assert any((a - b).abs().max() > 1e-4 * b.abs().max() for a, b in zip(untouched, want, strict=True))


def test_by_path_is_by_number() -> None:
    for model_type, path in (("opt", "model.decoder.layers.1.self_attn"), ("llama", "model.layers.1.self_attn")):
        model = small_model(model_type)
        _, _, heads = one_group(model)
        by_number, by_path = (prune_heads(copy.deepcopy(model), {key: heads[1]}) for key in (np.int64(1), path))
        assert {n: tuple(p.shape) for n, p in by_path.named_parameters()} != {
            n: tuple(p.shape) for n, p in model.named_parameters()
        }
        for (name, a), (_, b) in zip(by_number.state_dict().items(), by_path.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
        with unchanged(model), pytest.raises(ValueError, match=r"no attention has the path 'model\.nowhere'"):
            prune_heads(model, {"model.nowhere": [0]})
        with unchanged(model), pytest.raises(ValueError, match="named twice, by number and by path"):
            prune_heads(model, {1: [0], path: [0]})


def test_the_report() -> None:
    model = prune_heads(small_model("gpt2"), {1: [0, 2]})
    report = last_change(model)
    assert report is not None and report.heads_before == ((4, 4), (4, 4)) and report.heads_after == ((4, 4), (2, 2))
    assert "0,2" in str(report)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({5: [0]}, "layer 5"),
        ({0: [7]}, "head 7"),
        ({0: [0, 0]}, "twice"),
        ({}, "no head to remove"),
        ({True: [0]}, "True"),
    ],
)
def test_what_is_not_there(heads: dict[int, list[int]], message: str) -> None:
    model = small_model("opt")
    with unchanged(model), pytest.raises(ValueError, match=message):
        prune_heads(model, heads)


def test_a_norm_over_all_heads_is_named() -> None:
    model = small_model("olmo2")
    with unchanged(model), pytest.raises(ValueError, match=r"q_proj.weight: every query head depends on all of it"):
        prune_heads(model, {0: [0, 1]})


@pytest.mark.parametrize("model_type", ["t5", "mpnet"])
def test_a_bias_that_others_take_too_wants_the_same_heads(model_type: str) -> None:
    """Named by its parameter, with what to do; `test_cut_heads` does it."""
    model = small_model(model_type)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"attention_bias\.weight .*one for several") as error,
    ):
        prune_heads(model, {0: [0]})
    assert "Remove the same heads from all: {0: [0], 1: [0]}" in str(error.value)
    with unchanged(model), pytest.raises(ValueError, match="one for several"):
        prune_heads(model, {0: [0], 1: [1]})


@pytest.mark.parametrize("model_type", ["t5", "mt5", "longt5", "mpnet", "cpmant"])
def test_a_shared_bias_is_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    """The columns of the heads that went are gone from the table, also where it lies outside of the attentions."""
    model = small_model(model_type)
    found = discover(model)
    shared = {each.bias.name for each in found.attentions if each.bias is not None}
    prune_heads(model, {each.index: [1, 2] for each in found.attentions})
    parameters = dict(model.named_parameters())
    tables = [parameters[name] for name in shared if name in parameters]
    assert tables and all(table.shape[1] == 2 for table in tables)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, type(model)).eval()
    for a, b in zip(run_outputs(model, found.inputs), run_outputs(loaded, found.inputs), strict=True):
        assert torch.equal(a, b)
    prune_heads(loaded, {each.index: [0] for each in found.attentions})
    assert all(dict(loaded.named_parameters())[name].shape[1] == 1 for name in shared if name in parameters)


def test_an_encoder_alone_loses_heads_of_its_bias() -> None:
    """The decoder's has another table, and stays."""
    model = small_model("t5")
    prune_heads(model, {0: [3], 1: [3]})
    bias = [model.get_submodule(f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias") for part in
            ("encoder", "decoder")]  # fmt: skip
    assert [(each.weight.shape[1], each.embedding_dim) for each in bias] == [(3, 3), (4, 4)]


@pytest.mark.parametrize(("layers", "columns"), [((2, 3), 3), ((4, 5), 4)])
def test_self_and_cross_attention_of_a_decoder_have_biases_of_their_own(layers: tuple[int, int], columns: int) -> None:
    model = small_model("t5")
    prune_heads(model, {layer: [3] for layer in layers})
    assert model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape[1] == columns


def test_a_number_that_says_something_else_stays() -> None:
    """As many buckets as rows of a projection: few tokens do not show that there are fewer."""
    model = small_model("longt5")
    buckets = model.config.relative_attention_num_buckets
    prune_heads(model, {each.index: [1] for each in discover(model).attentions})
    found = {m.relative_attention_num_buckets for m in model.modules() if hasattr(m, "relative_attention_num_buckets")}
    assert found == {buckets} == {32}


def test_unequal_groups() -> None:
    model = small_model("mixtral")
    with unchanged(model), pytest.raises(ValueError, match="remove whole groups"):
        prune_heads(model, {0: [0]})


SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "build",
    [
        lambda: StableLmForCausalLM(StableLmConfig(**SIZES, num_key_value_heads=4, qk_layernorm=True)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, num_key_value_heads=2, use_qk_norm=True, eos_token_id=2)),
    ],
    ids=["a norm module for each head", "a norm with weights for each head"],
)
def test_norms_per_head_go_with_their_heads(build: object) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = build().double().eval()  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    found, owned, heads = one_group(model)
    whole = copy.deepcopy(model)
    prune_heads(model, {0: heads[0]})
    with torch.no_grad(), zeroed(whole, found, owned, {0: heads[0]}):
        torch.testing.assert_close(loss(model, found)[0], loss(whole, found)[0], rtol=0, atol=1e-9)
    prune_heads(model, {0: [0]} if owned[0].num_key_value_heads == 4 else {1: heads[1]})
    loss(model, found)


def test_hooks_modes_and_flags_stay() -> None:
    model = small_model("gpt2").train()
    model.transformer.h[0].attn.c_attn.weight.requires_grad = False
    prune_heads(model, {0: [1]})
    assert model.training and all(module.training for module in model.modules())
    assert not model.transformer.h[0].attn.c_attn.weight.requires_grad
    assert model.transformer.h[0].attn.c_proj.weight.requires_grad


@pytest.mark.parametrize(("model_type", "heads"), [("opt", [0]), ("llama", [0, 1])], ids=["found", "of the table"])
def test_a_change_that_is_not_proven_is_undone(model_type: str, heads: list[int]) -> None:
    """An output projection that gives something else when fewer heads come in."""
    model = small_model(model_type)
    layer = (model.model.decoder if model_type == "opt" else model.model).layers[0]
    output = layer.self_attn.out_proj if model_type == "opt" else layer.self_attn.o_proj

    def odd(x: Tensor) -> Tensor:
        return nn.Linear.forward(output, x) + x.shape[-1] * torch.arange(output.out_features)

    output.forward = odd
    with unchanged(model), pytest.raises(ValueError, match=r"differs from that of the uncut model"):
        prune_heads(model, {0: heads})


@pytest.mark.parametrize("kind", ["flash", "sliding_window"])
def test_a_swapped_model_is_looked_at_as_transformers_runs_it(kind: str) -> None:
    """A swapped attention is given a mask in code, which two rows of two heads would take for a bias by head."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    swap_attention(model, kind, **({"window": 4} if kind == "sliding_window" else {}))
    found, plain = discover(model), copy.deepcopy(model)
    with zeroed(model, found, ownerships(plain, discover(restore_attention(plain)).attentions), {0: [1]}):
        want = run_outputs(model, found.inputs)
    prune_heads(model, {0: [1]})
    torch.testing.assert_close(run_outputs(model, found.inputs), want, rtol=1e-5, atol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.out_features == 8


def test_what_another_kind_learned_goes_with_the_heads() -> None:
    model = swap_attention(swap_attention(small_model("granite"), "linear", feature_map="hedgehog"), "flash")
    for change in (lambda each: prune_heads(each, {0: [0, 1]}), lambda each: convert_to_gqa(each, 1)):
        changed = change(copy.deepcopy(model))
        assert (
            KEPT in model.model.layers[0].self_attn.__dict__ and KEPT not in changed.model.layers[0].self_attn.__dict__
        )


def test_gpt2_with_shared_keys_is_pruned_further(tmp_path: Path) -> None:
    """Its forward splits one matrix into parts that are no longer of one size."""
    model = convert_to_gqa(small_model("gpt2"), [1, 2])
    found = discover(model)
    heads = {0: [0, 3], 1: [2, 3]}
    with zeroed(model, found, ownerships(model, found.attentions), heads):
        want = run_outputs(model, found.inputs)
    prune_heads(model, heads)
    torch.testing.assert_close(run_outputs(model, found.inputs), want, rtol=1e-5, atol=1e-5)
    assert [each.attn.split_size for each in model.transformer.h] == [[16, 8, 8], [16, 8, 8]]
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path).eval()
    with torch.no_grad():
        for a, b in zip(run_outputs(again, found.inputs), run_outputs(model, found.inputs), strict=True):
            assert torch.equal(a, b)


def test_an_output_that_the_module_writes_into_is_followed() -> None:
    """DeBERTa divides what the projection of its relative positions gives, in place."""
    torch.manual_seed(0)
    config = DebertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, relative_attention=True, pos_att_type="c2p|p2c", initializer_range=0.3,
    )  # fmt: skip
    model = DebertaModel(config).eval()
    found, owned, _ = one_group(model)
    assert {"pos_proj.weight", "pos_q_proj.weight", "pos_q_proj.bias"} <= owned[0].owned.keys()
    with zeroed(model, found, owned, {0: [0, 2]}):
        want = loss(model, found)[0][0]
    got = loss(prune_heads(model, {0: [0, 2]}), found)[0][0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert model.encoder.layer[0].attention.self.pos_q_proj.weight.shape == (16, 32)
