"""Nothing is trusted that could silently be otherwise: stale configs, partial results, scores of nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.every_type import small_model
from support.models import CLASSES, aligned, batch, build, outputs
from support.pruned import numbers
from support.unchanged import unchanged

from hf_attnkit import convert_to_gqa, head_importance, load_pretrained, prune_heads, restore_attention, swap_attention

CALLS = {
    "swap": lambda m, inputs: swap_attention(m, "gqa", layers=[0]),
    "convert": lambda m, inputs: convert_to_gqa(m, 2),
    "prune": lambda m, inputs: prune_heads(m, {0: [0]}),
    "importance": lambda m, inputs: head_importance(m, [inputs]),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_after_set_attn_implementation(call) -> None:
    model = swap_attention(build("bert"), "flash")
    model.set_attn_implementation("sdpa")
    with unchanged(model), pytest.raises(ValueError, match=r"runs 'sdpa'; call .*restore_attention"):
        call(model, batch(model))
    expected = outputs(build("bert"), batch(model))
    restore_attention(model)
    assert torch.equal(outputs(model, batch(model)), expected)
    call(model, batch(model))  # now fine


@every_call
@pytest.mark.parametrize("implementation", [{}, {"attn_implementation": "sdpa"}], ids=["as saved", "sdpa"])
def test_after_a_plain_load(call, implementation: dict, tmp_path: Path) -> None:
    swap_attention(build("bert"), {0: "flash", 1: "gqa"}).save_pretrained(tmp_path)
    model = CLASSES["bert"]["base"].from_pretrained(tmp_path, **implementation)
    with unchanged(model), pytest.raises(ValueError, match=r"load_pretrained|restore_attention"):
        call(model, batch(model))
    restore_attention(model)  # the remedy that the message names
    assert "hf_attnkit" not in model.config.to_json_string()
    assert torch.equal(outputs(aligned(model), batch(model)), outputs(build("bert"), batch(model)))
    call(model, batch(model))


def test_config_names_exactly_the_kinds_on_the_modules() -> None:
    def path(layer: int) -> str:
        return f"encoder.layer.{layer}.attention.self"

    model = swap_attention(build("bert"), "flash", layers=[1])
    assert model.config.hf_attnkit == {"version": 2, "base": "sdpa", "layers": {path(1): ["flash", {}]}}
    swap_attention(model, {0: ("sliding_window", {"window": 3})})
    assert model.config.hf_attnkit["layers"] == {path(0): ["sliding_window", {"window": 3}], path(1): ["flash", {}]}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_attention_weights_of_some_layers_only_are_refused(family: str) -> None:
    """Transformers drops a layer without weights from the tuple, and the next takes its place."""
    model = swap_attention(build(family), "mha", layers=[1])
    with pytest.raises(ValueError, match="'sdpa' forms no attention weights"):
        model(**batch(model), output_attentions=True)
    swap_attention(model, "mha", layers=[0])
    assert len(model(**batch(model), output_attentions=True).attentions) == 2


def test_load_with_information_and_a_config_folder(tmp_path: Path) -> None:
    model = convert_to_gqa(build("bert"), 2)
    model.save_pretrained(tmp_path)
    loaded, information = load_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not information["missing_keys"]
    loaded = load_pretrained(tmp_path, config=str(tmp_path), attn_implementation=None)
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_mismatched_attention_is_never_left_at_random(tmp_path: Path) -> None:
    model = convert_to_gqa(build("bert", "sequence"), 2)
    model.save_pretrained(tmp_path)
    other = build("bert", "sequence").config  # without the record
    with pytest.raises(ValueError, match=r"attention projections, .*would be random.*|numbers of heads"):
        load_pretrained(tmp_path, type(model), config=other, ignore_mismatched_sizes=True)
    # A classifier of another size is what the option is for.
    assert load_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True).classifier.out_features == 5


def test_mismatched_attention_found_by_running_is_never_left_at_random(tmp_path: Path) -> None:
    model = small_model("opt")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.decoder.layers.1.self_attn.out_proj.weight"
    save_file(state | {name: state[name][:, :24].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"attention projections, '{name}' among them, .*would be random"):
        load_pretrained(tmp_path, ignore_mismatched_sizes=True)
    smaller = {"model.decoder.embed_positions.weight": state["model.decoder.embed_positions.weight"][:9].contiguous()}
    save_file(state | smaller, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_pretrained(tmp_path, ignore_mismatched_sizes=True) is not None


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_other_overrides_per_layer_survive(family: str) -> None:
    model = build(
        family, per_layer_config={0: {"attention_dropout": 0.25}}, allow_global_per_layer_attribute_access=True
    )
    convert_to_gqa(model, 4)
    assert [layer.attention_dropout for layer in model.config.per_layer_config] == [0.25, 0.0]
    assert model.config.num_key_value_heads == 4
    prune_heads(model, {1: [0, 1]})
    assert [layer.attention_dropout for layer in model.config.per_layer_config] == [0.25, 0.0]
    assert numbers(model) == [(8, 4), (6, 3)]


def test_scores_of_nothing_are_refused() -> None:
    model = build("bert")
    one_token = {"input_ids": torch.ones(3, 1, dtype=torch.long)}
    with unchanged(model), pytest.raises(ValueError, match="at least 2 tokens"):
        head_importance(model, [one_token])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("entropy", {"normalize": "no"}, "normalize='no' must be True or False"),
        ("random", {"seed": "x"}, "seed='x' must be an integer"),
        ("random", {"seed": -1}, "seed=-1 must be an integer of at least 0"),
    ],
)
def test_values_of_options_are_checked(method: str, options: dict, message: str) -> None:
    model = build("bert")
    with pytest.raises(ValueError, match=message):
        head_importance(model, [batch(model)], method=method, **options)
