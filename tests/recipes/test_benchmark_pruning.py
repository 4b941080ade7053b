"""The pruning benchmark on tiny models: what it times, and what it reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import pruning as benchmark_pruning
from benchmarks.pruning import attention_block, attention_blocks
from support.models import batch, build
from torch import nn

from hf_attnkit.models.layers import attention_layers


@pytest.mark.parametrize(("family", "name"), [("bert", "BertAttention"), ("llama", "LlamaAttention")])
def test_every_attention_block_runs_once_on_what_the_model_gives_it(family: str, name: str) -> None:
    model = build(family)
    inputs = batch(model)
    layers = attention_layers(model)
    assert {type(attention_block(layer)).__name__ for layer in layers} == {name}
    run = attention_blocks(model, inputs)
    outputs: dict[nn.Module, list[torch.Tensor]] = {layer.output: [] for layer in layers}
    for layer in layers:
        layer.output.register_forward_hook(lambda module, args, out: outputs[module].append(out))
    with torch.no_grad():
        model(**inputs)
    run()
    for layer in layers:
        whole, alone = outputs[layer.output]
        assert torch.equal(whole, alone)


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama", "causal", kv_heads=4).save_pretrained(tmp_path / "model")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--device", "cpu", "--batch_size", "2", "--length",
                 "8", "--repeats", "2", "--output_file", str(tmp_path / "times.json")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    benchmark_pruning.main()
    printed = capsys.readouterr().out
    assert "attention blocks" in printed and "16 -> 8 heads" in printed
    saved = json.loads((tmp_path / "times.json").read_text())
    assert saved["heads"] == [16, 8]
    assert all(len(row[side]) == 2 and min(row[side]) > 0 for row in saved["rows"] for side in ("full", "pruned"))


@pytest.mark.parametrize(("wrong", "message"), [("--fraction 0.01", "removes no head"), ("--repeats 0", "at least 1")])
def test_bad_arguments(wrong: str, message: str, tmp_path, monkeypatch, capsys) -> None:
    build("bert").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["x", "--model_name_or_path", str(tmp_path / "model"), *wrong.split()])
    with pytest.raises(SystemExit):
        benchmark_pruning.main()
    assert message in capsys.readouterr().err
