"""The decode benchmark on a tiny model: what it reports of speed and cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import decode as benchmark_decode
from benchmarks.decode import decode_step, prompt
from support.every_type import small_model
from support.models import build
from torch import nn
from transformers import Cache

from hf_attnkit import cache_bytes_per_token, swap_attention
from hf_attnkit.attention.growing_cache import BLOCK
from hf_attnkit.models.cache_size import held_bytes


def test_steps_behind_a_full_cache_are_alike() -> None:
    model = build("llama", "causal", kv_heads=4)
    cache, fill = prompt(model, torch.arange(10)[None])
    fill()
    assert held_bytes(cache) == 10 * cache_bytes_per_token(model)
    fill()
    assert cache.get_seq_length() == 10  # and not twice as many
    lengths: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.extend(given.get_seq_length() for given in kwargs.values() if isinstance(given, Cache))

    model.model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    step = decode_step(model, cache)
    for _ in range(3):
        step()
    assert lengths == [10, 10, 10] and cache.get_seq_length() == 10
    swap_attention(model, "flash", cache_dtype="int8")
    lengths.clear()
    cache, fill = prompt(model, torch.arange(10)[None])
    fill()
    step = decode_step(model, cache)
    for _ in range(3):
        step()
    assert [length for length in lengths if length] == [10, 11, 12]  # cannot be cropped


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


def test_kinds_of_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama", "causal", kv_heads=4)
    model.save_pretrained(tmp_path / "model")
    kinds = ["flash:cache_dtype=int8", "streaming_heads:share=0.5,window=4,num_sink_tokens=2", "linear"]
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--kinds", *kinds, "--device", "cpu",
                 "--lengths", "16", "--repeats", "2", "--first_token_repeats", "3",
                 "--output_file", str(tmp_path / "x.json")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmark_decode.py", *arguments])
    benchmark_decode.main()
    assert "first token, s" in capsys.readouterr().out
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["4 key/value heads", *kinds]
    assert all(len(row["first_token_seconds"]) == 3 and min(row["first_token_seconds"]) > 0 for row in rows)
    whole, eight_bits, streaming, _ = (row["cache_bytes"] for row in rows)
    size, per_token = model.config.head_dim, cache_bytes_per_token(model)
    assert whole == 16 * per_token and eight_bits == BLOCK * per_token * (size + 2) // (4 * size)
    kept = per_token // 2 * (BLOCK + 2 + 3)  # half of the heads have room for a block, half 2 sinks and a window of 4
    assert kept <= streaming < kept + 1024  # and positions


def test_a_window_of_the_models_own_grows() -> None:
    """Transformers' cache of it cannot be cropped."""
    model = build("mistral", "causal", 8, 2, sliding_window=6)
    cache, fill = prompt(model, torch.arange(20)[None])
    fill()
    step = decode_step(model, cache)
    step()
    step()
    assert cache.get_seq_length() == 22


def test_bytes_of_every_state() -> None:
    """Mamba's layers keep theirs in dictionaries."""
    model = small_model("jamba")
    cache, fill = prompt(model, torch.arange(12)[None])
    fill()
    states = [each for layer in cache.layers for kept in ("conv_states", "recurrent_states")
              for each in getattr(layer, kept, {}).values()]  # fmt: skip
    keys = [each for layer in cache.layers if hasattr(layer, "keys") for each in (layer.keys, layer.values)]
    assert states and held_bytes(cache) == sum(each.nbytes for each in (*states, *keys))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "nothing to compare with"),
        (["--kinds", "flash:"], "ends in a colon"),
        (["--kinds", "fast"], "--kinds"),
        (["--kinds", "streaming_heads:window=4"], "which share of the key/value heads"),
        (["--kinds", "streaming_heads:share=1,window=4"], "which share of the key/value heads"),
        (["--kinds", "streaming_heads:share=0.5"], "must say a window"),
        (["--kinds", "streaming_heads:share=0.5,window=4,renumber=true"], "'renumber' must be one of share, window"),
        (["--kinds", "flash", "flash"], "names one more than once"),
        (["--kinds", "flash:cache_dtype=int8,cache_dtype=int8"], "names cache_dtype once more"),
        (["--kinds", "flash", "--first_token_repeats", "-1"], "must be at least 0"),
    ],
)
def test_refused(
    wrong: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model_name_or_path", "m", *wrong])
    with pytest.raises(SystemExit):
        benchmark_decode.main()
    assert message in capsys.readouterr().err


def test_lengths_below_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model_name_or_path", "m", "--num_key_value_heads", "1", "--lengths", "0"])
    with pytest.raises(SystemExit):
        benchmark_decode.main()
