"""Every family: each implementation in its real model classes, on disk, while generating, and what its heads allow."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.importances import tolerance
from support.matrix import EXACT, MATRIX, kind
from support.models import CLASSES, DECODERS, SAMPLES, aligned, batch, build, outputs
from support.plain_attention import register
from support.pooling import pooled
from support.pruned import GROUPED, UNEVEN, assert_same, numbers, zeroed
from support.swapping import TERMS, build_for, layer_of, results, swapped
from support.unchanged import unchanged
from torch import Tensor
from transformers import BartForCausalLM, PreTrainedModel, T5EncoderModel

from hf_attnkit import convert_to_gqa, head_importance, load_pretrained, prune_heads, restore_attention, swap_attention
from hf_attnkit.models.layers import projected_layers

FAMILIES = list(SAMPLES)
EDITABLE = [family for family in FAMILIES if SAMPLES[family].editable]
FIXED = [family for family in FAMILIES if family not in EDITABLE]
ENCODER_DECODERS = ["t5", "bart"]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_editable = pytest.mark.parametrize("family", EDITABLE)
every_encoder_decoder = pytest.mark.parametrize("family", ENCODER_DECODERS)


def possible(name: str, family: str) -> bool:
    """One key/value head needs a family that can have it, and no bias can be added where there are no scores."""
    return (MATRIX[name].grouped or family in EDITABLE) and (MATRIX[name].matrix or family != "t5")


PAIRS = [(name, family) for name in MATRIX for family in FAMILIES if possible(name, family)]
CROSSING = [pair for pair in PAIRS if pair[1] in ENCODER_DECODERS]
# BERT, Llama and Mistral with all their heads are in test_swap.py. Here each kind runs in each family, and each of the
# family's classes with two kinds at least, which know nothing of the class.
HEADS = [
    (name, family, list(CLASSES[family])[number % len(CLASSES[family])])
    for family in FAMILIES
    if family not in ("bert", *DECODERS)
    for number, name in enumerate(name for name in MATRIX if possible(name, family))
]
GENERATORS = ["roberta", "electra", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", *ENCODER_DECODERS]


def check(name: str, model: PreTrainedModel, inputs: dict[str, Tensor], options: dict[str, Any], stock: str) -> None:
    """Ours in float64 is closer to attention as defined in float64 than that in float32 is.

    Transformers' norms and rotary embeddings are float32 in a float64 model too, so the two need not
    agree to the last bit of float64. A parameter's gradient can be small, or exact by luck, where
    terms of the size of its layer's largest cancel: one rounding of that size is always allowed.
    """
    ours = results(swapped(model, name, **options).double(), inputs)
    model.set_attn_implementation(stock)
    plain, exact = results(model, inputs), results(copy.deepcopy(model).double(), inputs)
    assert ours.keys() == exact.keys()
    largest: dict[str, float] = defaultdict(float)
    for key, value in exact.items():
        largest[layer_of(key)] = max(largest[layer_of(key)], value.abs().max().item())
    for key, value in exact.items():
        rounding = (plain[key] - value).abs().max().item() + torch.finfo(torch.float32).eps * largest[layer_of(key)]
        error = (ours[key] - value).abs().max().item()
        assert error <= rounding, f"{key}: off by {error:.3g}, float32 by {rounding:.3g}"


@pytest.mark.parametrize(("name", "family", "head"), HEADS)
def test_outputs_and_gradients(name: str, family: str, head: str) -> None:
    """With padding on either side; encoder-decoders with padded sources and targets of another length."""
    model = build_for(name, family, head)
    check(name, model, batch(model), MATRIX[name].options, "sdpa" if name in EXACT else register(name))


@pytest.mark.parametrize(("name", "family"), CROSSING)
def test_as_many_target_as_source_tokens(name: str, family: str) -> None:
    """The numbers of queries and keys of cross-attention agree by chance; nothing is padded."""
    model = build_for(name, family)
    ids = batch(model, (12, 12))["input_ids"]
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1), "attention_mask": torch.ones_like(ids)}
    check(name, model, inputs, MATRIX[name].options, "sdpa" if name in EXACT else register(name))


@pytest.mark.parametrize(("name", "family"), [pair for pair in CROSSING if pair[0] in EXACT])
def test_in_training(name: str, family: str) -> None:
    """In training mode, without dropout so that results can be compared."""
    model = build_for(name, family, "causal", **{"dropout_rate" if family == "t5" else "dropout": 0.0}).train()
    check(name, model, batch(model), MATRIX[name].options, "sdpa")


@every_encoder_decoder
@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_layers_that_keep_what_they_run(stock: str, family: str) -> None:
    """One layer of each kind swapped; the others run Transformers' attention under our masks."""
    model = build(family)
    model.set_attn_implementation(stock)
    inputs = batch(model)
    ours = swap_attention(copy.deepcopy(model), "gqa", layers=[1, 2, 6])
    assert_same(ours, model, inputs)


@every_family
def test_layers_are_numbered_in_one_sequence(family: str) -> None:
    layers = projected_layers(build(family))
    assert [layer.index for layer in layers] == list(range(len(layers)))
    names = [layer.name for layer in layers]
    if family in EDITABLE:
        assert names == [f"layer {layer.index} ({layer.saved_as})" for layer in layers]
    if family not in ENCODER_DECODERS:
        assert len(layers) == 2
        return
    assert [layer.is_cross for layer in layers] == [False] * 5 + [True] * 3
    t5 = family == "t5"
    assert names[1] == f"layer 1 (encoder.{'block.1.layer.0.SelfAttention' if t5 else 'layers.1.self_attn'})"
    assert names[2] == f"layer 2 (decoder.{'block.0.layer.0.SelfAttention' if t5 else 'layers.0.self_attn'})"
    assert names[7] == f"layer 7 (decoder.{'block.2.layer.1.EncDecAttention' if t5 else 'layers.2.encoder_attn'})"
    assert [layer.num_heads for layer in layers] == [8] * 2 + [8 if family == "t5" else 4] * 6


@pytest.mark.parametrize("name", [name for name in MATRIX if not MATRIX[name].crosses])
def test_patterns_leave_cross_attention_out(name: str) -> None:
    model = build("bart")
    ours = swapped(model, name, **MATRIX[name].options)
    paths = [f"{half}.layers.{i}.self_attn" for half, number in (("encoder", 2), ("decoder", 3)) for i in range(number)]
    assert list(ours.config.hf_attnkit["layers"]) == paths
    refused = rf"layer 6 \(decoder\.layers\.1\.encoder_attn\): '{kind(name)}' needs queries and keys of one sequence"
    for each in (model, ours):
        with unchanged(each), pytest.raises(ValueError, match=refused):
            swap_attention(each, kind(name), layers=[4, 6], **MATRIX[name].options)
        with unchanged(each), pytest.raises(ValueError, match=refused):
            swap_attention(each, {6: (kind(name), MATRIX[name].options)})


def test_no_scores_for_a_position_bias() -> None:
    model = build("t5")
    with unchanged(model), pytest.raises(ValueError, match=r"layer 0 .*'linear' forms no scores.* position bias"):
        swap_attention(model, "linear")


@every_family
def test_saves_reloads_and_restores(family: str, tmp_path: Path) -> None:
    """A window in self-attention, `gqa` in cross-attention; the restored model runs and saves as before."""
    model = build(family)
    inputs = batch(model)
    expected = outputs(model, inputs)
    state = model.config.to_json_string(use_diff=False)
    crosses = {layer.index: "gqa" for layer in projected_layers(model) if layer.is_cross}
    ours = swapped(model, "sliding_window", window=3)
    if crosses:
        swap_attention(ours, crosses)
    copy.deepcopy(ours).save_pretrained(tmp_path)  # a copy, because saving writes to the config
    again = aligned(load_pretrained(tmp_path))
    assert type(again) is type(model)
    assert again.config.hf_attnkit == ours.config.hf_attnkit
    assert len(again.config.hf_attnkit["layers"]) == len(projected_layers(model))
    assert torch.equal(outputs(again, inputs), outputs(ours, inputs))
    assert not torch.equal(outputs(ours, inputs), expected)
    assert torch.equal(outputs(restore_attention(again), inputs), expected)
    assert "hf_attnkit" not in again.config.to_json_string()
    assert torch.equal(outputs(restore_attention(ours), inputs), expected)
    assert ours.config.to_json_string(use_diff=False) == state


@every_encoder_decoder
def test_an_error_in_the_proof_leaves_all_configs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's encoder and decoder have copies of the config, which name the implementation too."""
    model = build(family)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(projected_layers(model)[7].module, "forward", broken)
    with unchanged(model), pytest.raises(ValueError, match="no memory"):
        swap_attention(model, "gqa")


SETTINGS = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}


@pytest.mark.parametrize(("name", "family"), [pair for pair in PAIRS if pair[0] in EXACT and pair[1] in GENERATORS])
def test_generation_equals_stock(name: str, family: str) -> None:
    # Transformers makes T5's caches for as many decoder layers as there are encoder layers.
    model = build_for(name, family, "causal", **({"num_decoder_layers": 2} if family == "t5" else {}))
    inputs = {key: batch(model)[key] for key in ("input_ids", "attention_mask")}
    ours = swapped(model, name)
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        expected = model.generate(**inputs, **SETTINGS, **options)
        assert torch.equal(ours.generate(**inputs, **SETTINGS, **options), expected)
    assert expected.unique().numel() > 4  # a model that repeats one token would not show a wrong mask


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_with_windows_of_their_own(name: str, family: str) -> None:
    """Layer 1 of 2 slides: two masks and two kinds of cache in one model."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = build_for(name, family, "causal", **window)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    inputs = batch(model)
    check(name, model, inputs, {}, "sdpa")
    assert not torch.equal(outputs(model, inputs), outputs(build_for(name, family, "causal"), inputs))
    expected = model.generate(**inputs, **SETTINGS)
    assert torch.equal(swapped(model, name).generate(**inputs, **SETTINGS), expected)


@pytest.mark.parametrize(("name", "family"), CROSSING)
def test_cache_equals_one_pass(name: str, family: str) -> None:
    """The decoder token by token, with the keys of both of its attentions kept."""
    ours = swapped(build_for(name, family, "causal"), name, **MATRIX[name].options)
    inputs = batch(ours)
    real = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        one, exact = ours(**inputs).logits, copy.deepcopy(ours).double()(**inputs).logits
        cache, steps = None, []
        for stop in range(1, real.shape[1] + 1):
            targets = {"decoder_input_ids": inputs["decoder_input_ids"][:, stop - 1 : stop],
                       "decoder_attention_mask": inputs["decoder_attention_mask"][:, :stop]}  # fmt: skip
            step = ours(**(inputs | targets), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
    assert_as_accurate(torch.cat(steps, dim=1)[real], one[real], exact[real], terms=TERMS)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: T5EncoderModel(build("t5").config), 2),
        (lambda: BartForCausalLM(build("bart").config), 6),
    ],
    ids=["encoder", "decoder"],
)
def test_half_of_an_encoder_decoder(make: Any, layers: int, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = make().eval()
    inputs: dict[str, Any] = {"input_ids": batch(build("bert"))["input_ids"]}
    inputs["attention_mask"] = batch(build("bert"))["attention_mask"]
    if layers == 6:
        inputs |= {"encoder_hidden_states": torch.randn(3, 5, 64), "encoder_attention_mask": torch.ones(3, 5)}
        inputs["use_cache"] = False
        inputs["encoder_attention_mask"][1, 2:] = 0
    assert len(projected_layers(model)) == layers
    ours = swap_attention(copy.deepcopy(model), "gqa")
    expected = outputs(model, inputs).detach()
    exact = inputs | {name: x.double() for name, x in inputs.items() if name == "encoder_hidden_states"}
    truth = outputs(copy.deepcopy(model).double(), exact).detach()
    assert_as_accurate(outputs(ours, inputs).detach(), expected, truth, terms=TERMS)
    ours.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert type(again) is type(model) and torch.equal(outputs(again, inputs), outputs(ours, inputs))


@every_encoder_decoder
def test_a_part_of_a_model_is_swapped_in_the_whole(family: str, tmp_path: Path) -> None:
    model = build(family)
    inputs = batch(model)
    expected = outputs(model, inputs)
    swap_attention(model.encoder, "gqa")
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path).eval()
    for each in (model, again):
        assert len(each.config.hf_attnkit["layers"]) == 2
        torch.testing.assert_close(outputs(each, inputs), expected, rtol=1e-5, atol=1e-5)


@every_editable
@pytest.mark.parametrize("number", [1, 2])
def test_conversion_equals_repeated_means(family: str, number: int) -> None:
    model = build(family)
    repeated = copy.deepcopy(model)
    with torch.no_grad():
        for layer in projected_layers(repeated):
            for name in ("key", "value"):
                for p in getattr(layer, name).parameters():
                    rows = layer.rows(name)
                    means = pooled(p[rows], number, layer.head_dim).unflatten(0, (number, layer.head_dim))
                    p[rows] = means.repeat_interleave(8 // number, dim=0).flatten(0, 1)
    convert_to_gqa(model, number)
    assert numbers(model) == [(8, number)] * 2
    assert_same(model, repeated, batch(model))


@pytest.mark.parametrize("family", [family for family in EDITABLE if family != "phi3"])
@pytest.mark.parametrize("grouped", [False, True], ids=["multi-head", "grouped"])
def test_pruning_equals_zeroing_and_reloads(grouped: bool, family: str, tmp_path: Path) -> None:
    """Another number of heads in each layer; then swapped, saved and loaded."""
    model = convert_to_gqa(build(family), 2) if grouped else build(family)
    selection = GROUPED if grouped else UNEVEN
    reference = zeroed(model, selection)
    prune_heads(model, selection)
    assert numbers(model) == ([(4, 1), (4, 2)] if grouped else [(5, 5), (3, 3)])
    for layer in projected_layers(model):
        own = {getattr(layer.module, name, None) for name in ("n_heads", "num_heads", "num_attention_heads")}
        assert own <= {None, layer.num_heads}
    inputs = batch(model)
    assert_same(model, reference, inputs)
    assert_same(swapped(model, "flash"), reference, inputs)
    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert numbers(again) == numbers(model)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_different_layers_are_refused_where_the_forward_reads_the_config() -> None:
    model = build("phi3")
    with unchanged(model), pytest.raises(ValueError, match="all layers must lose the same heads"):
        prune_heads(model, {0: [0], 1: [1, 2]})


@every_editable
@pytest.mark.parametrize("change", ["converted", "pruned"])
def test_uniform_changes_load_plainly_where_transformers_can(change: str, family: str, tmp_path: Path) -> None:
    model = build(family)
    if change == "converted":
        convert_to_gqa(model, 2)
    else:
        prune_heads(model, {0: [0, 1, 2, 3], 1: [1, 3, 5, 7]})
    model.save_pretrained(tmp_path)
    inputs = batch(model)
    assert torch.equal(outputs(aligned(load_pretrained(tmp_path)), inputs), outputs(model, inputs))
    no_head_dim = ("bert", "roberta", "electra", "distilbert", "stablelm")
    if SAMPLES[family].grouped if change == "converted" else family not in no_head_dim:
        plain = aligned(type(model).from_pretrained(tmp_path))
        assert torch.equal(outputs(plain, inputs), outputs(model, inputs))
    else:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path)


@every_editable
def test_importance(family: str) -> None:
    """Entropy by definition from eager attention's weights; the baselines; looking changes nothing."""
    model = build(family)
    inputs = batch(model, (13, 13))
    with unchanged(model):
        entropy = head_importance(model, [inputs], method="entropy", normalize=False)
        random, magnitude = (head_importance(model, method=method) for method in ("random", "magnitude"))
    eager = copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    p = torch.stack(eager(**inputs, output_attentions=True).attentions)  # (layers, batch, heads, queries, keys)
    expected = (p * torch.where(p > 0, p, 1.0).log()).sum(-1).mean((1, 3))  # focused heads score high
    assert (entropy - expected).abs().max() <= tolerance(3)
    assert entropy.max() - entropy.min() > 0.05
    assert random.shape == magnitude.shape == (2, 8) and random.isfinite().all()
    for layer, scores in zip(projected_layers(model), magnitude.double(), strict=True):
        only = [getattr(layer, name).weight[layer.rows(name)].double().unflatten(0, (8, -1)).square().sum((1, 2))
                for name in ("query", "key", "value")]  # fmt: skip
        only.append(layer.output.weight.double().unflatten(1, (8, -1)).square().sum((0, 2)))
        torch.testing.assert_close(scores, sum(only).sqrt(), rtol=1e-6, atol=0)  # float32 sums of 1024 squares


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma", "roberta", "electra"])
def test_changed_decoders_generate(family: str, tmp_path: Path) -> None:
    """Grouped, pruned unevenly, reloaded, swapped: the cache holds another number of heads in each layer."""
    model = prune_heads(convert_to_gqa(build(family, "causal"), 2), GROUPED)
    inputs = {key: batch(model)[key] for key in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, **SETTINGS)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(**inputs, **SETTINGS), expected)
    assert torch.equal(swap_attention(again, "gqa").generate(**inputs, **SETTINGS), expected)
