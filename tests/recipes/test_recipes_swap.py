"""The recipe that swaps attention: by name or by a file of layers, recovered, saved, and refused before measuring."""

from __future__ import annotations

import json
from unittest.mock import create_autospec

import finetune_glue
import pytest
import swap_attention_glue
from huggingface_hub import ModelCard
from support.fakes import never
from support.models import build
from support.recipe_runs import flags, run
from support.unchanged import unchanged

import hf_attnkit
from hf_attnkit.attention import swap
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.training import train

only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)


def test_a_window_is_trained_saved_and_scores_what_was_reported(checkpoint, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    more = ("--attention", "sliding_window", "--attention_options", "window=2", "--learning_rate", "1e-2")
    more += (
        "--refit",
        "output",
        "--calibration_samples",
        "24",
        "--distill",
        "--lora",
        "--lora_r",
        "4",
        "--entropy_every_n_steps",
        "0",
    )
    results = run(swap_attention_glue, monkeypatch, flags(checkpoint, output, *more))
    assert [(stage["stage"], stage["attention"]) for stage in results["stages"]] == [
        ("baseline", ["sdpa", "sdpa"]), ("changed", ["sliding_window"] * 2), ("recovered", ["sliding_window"] * 2),
    ]  # fmt: skip
    assert results["attention_options"] == {"window": 2} and results["distill"] and results["lora_r"] == 4
    assert results["change"]["facts"]["refit"] == "output"
    assert results["stages"][0]["metrics"] != results["stages"][1]["metrics"]  # a window of 2 leaves much out
    assert "attention_entropy" not in (output / "trainer_state_1.json").read_text()
    model = hf_attnkit.load_pretrained(output)
    assert list(model.config.hf_attnkit["layers"].values()) == [["sliding_window", {"window": 2}]] * 2
    # Measured again from the saved checkpoint alone.
    again = run(finetune_glue, monkeypatch, flags(output, tmp_path / "again", "--do_eval"))
    assert again["stages"][0]["metrics"] == pytest.approx(results["stages"][-1]["metrics"])
    card = ModelCard.load(output / "README.md")
    assert "sliding_window" in card.data.tags and "hf_attnkit.load_pretrained" in card.text
    assert "2 x sliding_window" in (output / "report.html").read_text(encoding="utf-8")


@only_bert
def test_a_file_says_it_layer_by_layer(checkpoint, tmp_path, monkeypatch) -> None:
    mapping = tmp_path / "mapping.json"
    mapping.write_text('{"1": ["local_global", {"window": 2, "num_global_tokens": 1}]}')
    more = ("--attention", str(mapping), "--do_eval")
    results = run(swap_attention_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))
    assert [stage["attention"] for stage in results["stages"]] == [["sdpa", "sdpa"], ["sdpa", "local_global"]]
    assert results["attention_options"] == {"1": {"window": 2, "num_global_tokens": 1}}
    saved = hf_attnkit.load_pretrained(tmp_path / "out").config.hf_attnkit["layers"]
    assert list(saved) == ["bert.encoder.layer.1.attention.self"]


@only_bert
def test_linear_attention_trains_without_entropies_and_says_so(checkpoint, tmp_path, monkeypatch) -> None:
    warned = []
    fake = create_autospec(train.logger.warning, side_effect=warned.append)
    monkeypatch.setattr(train.logger, "warning", fake)
    more = ("--attention", "linear", "--attention_options", "feature_map=hedgehog")
    with pytest.warns(UserWarning, match="linear attention is another function"):
        results = run(swap_attention_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))
    assert results["stages"][-1]["attention"] == ["linear", "linear"]
    assert len(warned) == 1 and "every layer runs linear attention" in warned[0]
    assert "attention_entropy" not in (tmp_path / "out" / "trainer_state_1.json").read_text()


BAD = [
    (("--attention", "sliding"), "unknown attention 'sliding'"),
    (("--attention", "sliding_window"), "needs the option window"),
    (("--attention", "sliding_window", "--attention_options", "size=3"), "no option size"),
    (("--attention", "sliding_window", "--attention_options", "window=0"), "window=0"),
    (("--attention", "sliding_window", "--attention_options", "window"), "_options 'window' must have the form"),
    (("--attention", "mha", "--attention_options", "model=1"), "no option model"),
    (("--attention", "mqa"), "mqa"),
    (("--attention", "no.json"), "no.json does not exist"),
    (("--attention", "FILE[1]"), "must be JSON such as"),
    (('--attention', 'FILE{"x": "mha"}'), "must be JSON such as"),
    (("--attention", 'FILE{"0": ["mha"]}'), "layer 0"),
    (("--attention", 'FILE{"2": "mha"}'), "layer 2"),
    (("--attention", "FILE{}"), "no layer to swap"),
    (("--attention", 'FILE{"0": "mha"}', "--attention_options", "window=2"), "has no effect with"),
    (("--attention", "mha", "--calibration_samples", "8"), "has no effect with --refit none"),
    (("--attention", "mha", "--refit", "output", "--calibration_samples", "0"), "must be at least 1"),
    (("--attention", "mha", "--lora_r", "4"), "without --lora"),
    (("--attention", "mha", "--distill", "--do_eval"), "--distill has no effect without training"),
    (("--attention", "linear", "--attention_options", "feature_map=hedgehog", "--lora"), "leave --lora out"),
]  # fmt: skip


@only_bert
@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_named_before_anything_is_measured(wrong, message, checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(swap_attention_glue.GlueRun, "evaluate", never(Run.evaluate, "measured before"))
    given = list(wrong)
    if given[1].startswith("FILE"):
        (tmp_path / "mapping.json").write_text(given[1].removeprefix("FILE"))
        given[1] = str(tmp_path / "mapping.json")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(swap_attention_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()


def test_checking_a_swap_changes_nothing() -> None:
    model = build("llama")
    with unchanged(model):
        kinds = swap.check(model, ("sliding_window", {"window": 4}), layers=[1])
        with pytest.raises(ValueError, match="no option size"):
            swap.check(model, "sliding_window", size=4)
    assert kinds == {1: SlidingWindowAttention(window=4)}
    assert (
        json.dumps(hf_attnkit.swap_attention(model, "mha").config.hf_attnkit["layers"]["layers.1.self_attn"])
        == '["mha", {}]'
    )
