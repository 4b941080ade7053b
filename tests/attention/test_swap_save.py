"""Swapped models on disk: they come back the same, and never with other attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.matrix import MATRIX
from support.models import DECODERS, EVERY_HEAD, aligned, batch, build, outputs
from support.subprocesses import run_python
from support.swapping import build_for, swapped
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads, restore_attention, swap_attention


@pytest.mark.parametrize("family", ["bert", *DECODERS])
@pytest.mark.parametrize("name", list(MATRIX))
def test_reloads_bit_equal_twice(name: str, family: str, tmp_path: Path) -> None:
    if (name, family) == ("mqa", "bert"):
        model = swapped(convert_to_gqa(build("bert"), 1), name)
    else:
        model = swapped(build_for(name, family), name, **MATRIX[name].options)
    inputs = batch(model)
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path / "one")
    again = aligned(load_pretrained(tmp_path / "one"))
    assert type(again) is type(model)
    assert torch.equal(outputs(again, inputs), expected)
    assert again.config.hf_attnkit == model.config.hf_attnkit
    again.save_pretrained(tmp_path / "two")
    third = aligned(load_pretrained(tmp_path / "two"))
    assert torch.equal(outputs(third, inputs), expected)
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD, ids=lambda x: x)
def test_every_head_type_reloads(family: str, head: str, tmp_path: Path) -> None:
    """Only one layer swapped; the other keeps SDPA after loading too."""
    model = swapped(build(family, head), {1: ("local_global", {"window": 3, "num_global_tokens": 2})})
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert type(again) is type(model)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_a_checkpoint_may_name_options_at_their_defaults(tmp_path: Path) -> None:
    """Saved are the options that differ from the defaults; a config.json that names all of them means the same."""
    given = {"window": 4, "num_sink_tokens": 0, "backend": "auto"}
    model = swap_attention(build("llama"), "sliding_window", **given)
    assert model.config.hf_attnkit["layers"]["layers.0.self_attn"] == ["sliding_window", {"window": 4}]
    expected = outputs(model, batch(model))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["hf_attnkit"]["layers"]["layers.0.self_attn"] = ["sliding_window", given]
    path.write_text(json.dumps(config))
    assert torch.equal(outputs(aligned(load_pretrained(tmp_path)), batch(model)), expected)


def test_options_may_be_integers_of_other_libraries(tmp_path: Path) -> None:
    """They are saved as JSON knows them."""
    model = swap_attention(build("llama"), "sliding_window", window=np.int64(4), num_sink_tokens=torch.tensor(1))
    assert model.config.hf_attnkit["layers"]["layers.1.self_attn"] == [
        "sliding_window",
        {"window": 4, "num_sink_tokens": 1},
    ]
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(aligned(load_pretrained(tmp_path)), batch(model)), outputs(model, batch(model)))


def test_a_reloaded_model_restores(tmp_path: Path) -> None:
    model = build("llama", "causal")
    inputs = batch(model)
    expected = outputs(model, inputs)
    swapped(model, "sliding_window", window=2).save_pretrained(tmp_path)
    again = restore_attention(aligned(load_pretrained(tmp_path)))
    assert torch.equal(outputs(again, inputs), expected)
    again.save_pretrained(tmp_path / "plain")
    plain = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    assert torch.equal(outputs(plain, inputs), expected)


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_other_layers_reload_with_what_they_ran(stock: str, tmp_path: Path) -> None:
    model = build("bert")
    model.set_attn_implementation(stock)
    model = swapped(model, "sliding_window", window=2, layers=[0])
    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert again.config.hf_attnkit["base"] == stock
    assert torch.equal(outputs(again, batch(model)), outputs(model, batch(model)))
    assert restore_attention(again).config._attn_implementation == stock


def test_another_attention_for_a_swapped_checkpoint_is_refused(tmp_path: Path) -> None:
    swapped(build("bert"), "flash").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa' contradicts it; leave it out.*restore_attention"):
        load_pretrained(tmp_path, attn_implementation="sdpa")


def test_swapped_pruned_and_converted_together(tmp_path: Path) -> None:
    model = prune_heads(convert_to_gqa(build("bert", "sequence"), 2), {0: [0, 1, 2, 3], 1: [3, 7]})
    model = swapped(model, {0: "gqa", 1: ("sliding_window", {"window": 3})})
    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path, AutoModelForSequenceClassification))
    assert torch.equal(outputs(again, batch(model)), outputs(model, batch(model)))


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_plain_from_pretrained_fails_at_the_first_forward(family: str, tmp_path: Path) -> None:
    """With this package imported its name is known, but no layer has a kind."""
    model = swapped(build(family), "sliding_window", window=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no kind of attention was chosen.*hf_attnkit.load_pretrained"):
        loaded(**batch(model))


@pytest.mark.slow
def test_without_this_package_loading_fails(tmp_path: Path) -> None:
    for family in ("bert", "llama"):
        swapped(build(family), "sliding_window", window=2).save_pretrained(tmp_path / family)
    said = run_python(
        """
        import sys
        from transformers import AutoModel
        for family in ("bert", "llama"):
            try:
                AutoModel.from_pretrained(f"{sys.argv[1]}/{family}")
            except ValueError as error:
                assert "hf_attnkit" in str(error), error
                print(family, "refused")
        assert "hf_attnkit" not in sys.modules
        """,
        tmp_path,
    )
    assert said.split("\n") == ["bert refused", "llama refused", ""]
