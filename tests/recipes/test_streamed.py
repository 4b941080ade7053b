"""The comparison of texts read through a cache: what it measures, of which model, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from compare import streamed_lm
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import hf_attnkit
from hf_attnkit.attention.growing_cache import BLOCK as BLOCK_OF_THE_CACHE

WINDOW, SINKS, BLOCK, BLOCKS, CHUNK = 6, 2, 16, 6, 10
ENDLESS = f"sliding_window:window={WINDOW},num_sink_tokens={SINKS},renumber=true"


def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, text: tuple[Path, Path], output: Path, *more: str) -> dict:
    arguments = [
        *("--model_name_or_path", str(checkpoint), "--output_dir", str(output), "--train_file", str(text[0])),
        *("--validation_file", str(text[1]), "--block_size", str(BLOCK), "--max_eval_samples", str(BLOCKS)),
        *("--chunk_size", str(CHUNK), "--last_tokens", "30", "--fresh_tokens", "8", "--score_tokens", "64"),
        *("--report_to", "none", "--use_cpu", "--disable_tqdm", "true", *more),
    ]
    monkeypatch.setattr(sys, "argv", ["streamed_lm.py", *arguments])
    streamed_lm.main()
    return json.loads((output / "results.json").read_text())


def test_every_variant(text_checkpoint, text, tmp_path, monkeypatch, capsys) -> None:
    seen = {}
    read = streamed_lm.through_cache.read

    def noted(model, ids, *others):
        seen["ids"] = ids
        return read(model, ids, *others)

    monkeypatch.setattr(streamed_lm.through_cache, "read", noted)
    words = ["untouched", "fresh", ENDLESS, f"sliding_window:window={WINDOW}", "flash:cache_dtype=int8",
             f"streaming_heads:share=0.5,window={WINDOW},num_sink_tokens={SINKS}"]  # fmt: skip
    results = run(monkeypatch, text_checkpoint, text, tmp_path, "--variants", *words)
    stages = dict(zip(words, results["stages"], strict=True))
    assert [stage["variant"] for stage in results["stages"]] == words
    ids = seen["ids"]
    assert len(ids) == BLOCK * BLOCKS

    def reference(spec=None):
        model = AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float64)
        if spec is not None:
            hf_attnkit.swap_attention(model, *spec[:1], **spec[1])
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0]
        return F.cross_entropy(logits[:-1], ids[1:], reduction="none")

    losses = reference()
    # Of 96 tokens the last 30 begin in the chunk that starts at 60: the loss at index i is that of token i + 1.
    for name, spec in {"untouched": None, words[3]: ("sliding_window", {"window": WINDOW})}.items():
        losses = reference(spec)
        found = stages[name]["metrics"]
        assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        assert found["last_perplexity"] == pytest.approx(math.exp(losses[59:].mean()), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float64)
    fresh = []
    for start in range(60, 96, 8):
        piece = ids[start - 8 : start + 8]
        with torch.no_grad():
            logits = model(piece[None]).logits[0]
        fresh.append(F.cross_entropy(logits[7:-1], piece[8:], reduction="none"))
    assert sum(map(len, fresh)) == 36
    assert stages["fresh"]["metrics"]["last_perplexity"] == pytest.approx(math.exp(torch.cat(fresh).mean()), rel=1e-5)
    assert "perplexity" not in stages["fresh"]["metrics"]

    whole = stages["untouched"]["points"]
    per_token = hf_attnkit.cache_bytes_per_token(model.float())
    assert [point["tokens"] for point in whole] == [*range(CHUNK, 96, CHUNK), 96]
    assert [point["cache_bytes"] for point in whole] == [point["tokens"] * per_token for point in whole]
    flat = [point["cache_bytes"] for point in stages[ENDLESS]["points"]]
    assert len(set(flat)) == 1 and flat[0] < whole[1]["cache_bytes"]
    size = model.config.head_dim
    eight_bits = [point["cache_bytes"] for point in stages[words[4]]["points"]]
    assert set(eight_bits) == {BLOCK_OF_THE_CACHE * per_token * (size + 2) // (4 * size)}  # room for a whole block
    assert all(point["memory_bytes"] > 2**20 for point in whole)
    assert len({str(stage["metrics"]) for stage in results["stages"]}) == len(words)
    assert (tmp_path / "reading.png").stat().st_size > 10_000 and "of the last 36" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--variants", "fast"), "--variants"),
        (("--variants", "fresh", "fresh"), "names one more than once"),
        (("--variants", "flash:window"), "must have the form name=value"),
        (("--variants", "untouched", "flash:cache_dtype=int7"), "int7"),
        (("--variants", "untouched", "flash:speed=9"), "speed"),
        (("--variants", "streaming_heads:share=0.5,window=0"), "window=0"),
        (("--variants", "streaming_heads:share=2,window=4"), "which share of the key/value heads"),
        (("--variants", "untouched", "streaming_heads:share=0.01,window=4"), "is less than one"),
        (("--chunk_size", "0"), "--chunk_size 0 must be at least 1"),
        (("--last_tokens", "97"), "--last_tokens 97 is more than the text's 96 tokens"),
    ],
)
def test_bad_input(more, message, text_checkpoint, text, tmp_path, monkeypatch) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        run(monkeypatch, text_checkpoint, text, tmp_path, *more)
