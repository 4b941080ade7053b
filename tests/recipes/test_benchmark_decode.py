"""The decode benchmark on a tiny model: what it reports of speed and cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import decode as benchmark_decode
from benchmarks.decode import decode_step, filled_cache, held_bytes
from support.models import build
from torch import nn
from transformers import Cache

from hf_attnkit import cache_bytes_per_token


def test_steps_behind_a_full_cache_are_alike() -> None:
    model = build("llama", "causal", kv_heads=4)
    cache = filled_cache(model, 10)
    assert held_bytes(cache) == 10 * cache_bytes_per_token(model)
    lengths: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.extend(given.get_seq_length() for given in kwargs.values() if isinstance(given, Cache))

    model.model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    step = decode_step(model, cache)
    for _ in range(3):
        step()
    assert lengths == [10, 10, 10] and cache.get_seq_length() == 10


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama", "causal", kv_heads=4).save_pretrained(tmp_path / "model")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--num_key_value_heads", "2", "1", "--device", "cpu",
                 "--lengths", "8", "16", "--repeats", "2", "--output_file", str(tmp_path / "decode.json")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmark_decode.py", *arguments])
    benchmark_decode.main()
    printed = capsys.readouterr().out
    assert "4 key/value heads" in printed and "1 key/value heads + gqa" in printed
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert len(rows) == 2 * 6 and all(len(row["seconds"]) == 2 for row in rows)
    held = {(row["length"], row["model"]): row["cache_bytes"] for row in rows}
    assert held[16, "4 key/value heads"] == 2 * held[16, "2 key/value heads"] == 4 * held[16, "1 key/value heads"]
    assert held[16, "4 key/value heads"] == 2 * held[8, "4 key/value heads + gqa"]
    assert torch.tensor([row["seconds"] for row in rows]).min() > 0


def test_lengths_below_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model_name_or_path", "m", "--num_key_value_heads", "1", "--lengths", "0"])
    with pytest.raises(SystemExit):
        benchmark_decode.main()
