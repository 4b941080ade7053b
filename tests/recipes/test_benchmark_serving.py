"""The benchmark of serving: which inputs it takes, what it prints, what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks import serving
from support.models import build

pytest.importorskip("onnxruntime")


def test_sides_of_a_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, heads in (("untouched", 8), ("changed", 2)):
        build("llama", "causal", kv_heads=heads).save_pretrained(tmp_path / name)
    monkeypatch.setattr(sys, "argv", [
        *("serving.py", "--model_name_or_path", str(tmp_path / "untouched"), "--changed", str(tmp_path / "changed")),
        *("--sides", "pytorch", "--batch_sizes", "1", "2", "--length", "6", "--new_tokens", "3", "--threads", "1"),
        *("--repeats", "2"),
    ])  # fmt: skip
    serving.main()
    printed = capsys.readouterr().out
    assert "3 tokens behind 6" in printed and "tokens/s" in printed
    assert printed.count("untouched") == printed.count("changed") == 2 and "1,024" not in printed
    assert "1024" in printed and " 256 " in printed  # bytes of the cache for each token


def test_prompts_are_padded_on_the_left_and_texts_on_the_right() -> None:
    left = serving.sample(build("llama", "causal"), 2, 9)["attention_mask"]
    right = serving.sample(build("bert", "sequence"), 2, 9)["attention_mask"]
    assert left.equal(right.flip(1)) and right[:, 0].all() and not left.all()


@pytest.mark.parametrize("wrong", [["--batch_sizes", "0"], ["--sides", "tensorflow"], ["--threads", "0"]])
def test_refused(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serving.py", "--model_name_or_path", "m", *wrong])
    with pytest.raises(SystemExit):
        serving.main()
