"""The comparison of heads that stream: what it measures, and how large it says the cache is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from compare import long_context_lm
from compare.long_context_lm import OUTPUTS
from transformers import AutoModelForCausalLM

import hf_attnkit

WINDOW, SINKS, BLOCK = 4, 2, 32


def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, text: tuple[Path, Path], output: Path, *more: str) -> dict:
    arguments = [
        *("--model_name_or_path", str(checkpoint), "--output_dir", str(output), "--train_file", str(text[0])),
        *("--validation_file", str(text[1]), "--block_size", str(BLOCK), "--windows", str(WINDOW)),
        *("--num_sink_tokens", str(SINKS), "--random_draws", "2", "--score_tokens", "300", "--refit_tokens", "600"),
        *("--report_to", "none", "--use_cpu", "--disable_tqdm", "true", *more),
    ]
    monkeypatch.setattr(sys, "argv", ["long_context_lm.py", *arguments])
    long_context_lm.main()
    return json.loads((output / "results.json").read_text())


def test_every_variant(text_checkpoint, text, tmp_path, monkeypatch, capsys) -> None:
    results = run(monkeypatch, text_checkpoint, text, tmp_path, "--shares", "0.5", "1")
    baseline, *others = results["stages"]
    found = [(stage["share"], stage["variant"]) for stage in others]
    assert [variant for share, variant in found if share == 0.5] == [
        "reach", "reach+refit", OUTPUTS, f"{OUTPUTS}+refit",
        "random", "random", "random+refit", "random+refit", "window",
    ]  # fmt: skip
    assert [variant for share, variant in found if share == 1] == ["reach", "reach+refit", "window"]  # all, whatever
    kept = (SINKS + WINDOW - 1) / BLOCK
    for stage in others:
        assert stage["cache_share"] == pytest.approx(1 - stage["share"] * (1 - kept))
    by_variant = {(stage["share"], stage["variant"]): stage["metrics"]["perplexity"] for stage in others}
    # All heads stream, chosen or not: the window and the sinks for all that keep as much.
    assert by_variant[1, "reach"] == pytest.approx(by_variant[1, "window"], rel=1e-5)
    assert by_variant[1, "reach"] != pytest.approx(baseline["metrics"]["perplexity"], rel=1e-4)
    printed = capsys.readouterr().out
    assert "a multiple of the untouched model's" in printed and "100%" in printed


def test_the_perplexity_is_that_of_the_model_it_names(text_checkpoint, text, tmp_path, monkeypatch) -> None:
    results = run(monkeypatch, text_checkpoint, text, tmp_path, "--shares", "0.5", "--variants", "reach",
                  "--find", "passkey", "induction", "--find_lengths", "80", "96")  # fmt: skip
    found = [stage["found"] for stage in results["stages"]]
    assert [list(each) for each in found] == [["passkey", "induction"]] * 2
    assert all(list(shares) == ["80", "96"] for each in found for shares in each.values())
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint)
    kinds = []

    def swap(each, given, **options):
        kinds.append(given)
        return hf_attnkit.refitting.swap_attention.swap_attention(each, given, **options)

    monkeypatch.setattr(hf_attnkit, "swap_attention", swap)
    again = run(monkeypatch, text_checkpoint, text, tmp_path / "again", "--shares", "0.5", "--variants", "reach")
    assert again["stages"][1]["metrics"] == results["stages"][1]["metrics"]
    heads = sum(model.config.num_key_value_heads if name == "sliding_window" else len(options.get("heads", ()))
                for name, options in kinds[0].values())  # fmt: skip
    assert heads == 4  # half of two layers of four


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--variants", "entropy"), "--variants 'entropy' must be one of reach"),
        (("--shares", "0"), r"--shares 0.0 must be above 0"),
        (("--random_draws", "0"), "--random_draws 0 must be at least 1"),
        (("--windows", "0"), "window=0 must be"),
        (("--find", "needle"), "--find 'needle' must be one of passkey, induction"),
        (("--find_draws", "0"), "--find_draws 0 must be at least 1"),
        (("--find", "induction", "--find_lengths", "32"), "induction in 32 tokens needs -16 tokens of text"),
    ],
)
def test_bad_input(more, message, text_checkpoint, text, tmp_path, monkeypatch) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        run(monkeypatch, text_checkpoint, text, tmp_path, *more)
