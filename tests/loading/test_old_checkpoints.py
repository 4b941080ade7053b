"""Checkpoints that an earlier version wrote load, and give the logits that it gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_attnkit import load_pretrained

FOLDER = Path(__file__).parents[1] / "data" / "old_checkpoints"
INPUTS = torch.arange(18).view(2, 9)
NAMES = sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").exists())


def test_there_are_some_of_each_kind() -> None:
    assert {"llama_pruned_by_layer", "llama_swapped", "bert_converted", "bert_without_heads_in_a_layer"} <= set(NAMES)
    assert all(path.stat().st_size < 50_000 for path in FOLDER.rglob("*.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_loads(name: str, tmp_path: Path) -> None:
    want = load_file(FOLDER / name / "expected.safetensors")["logits"]
    model = load_pretrained(FOLDER / name).eval()
    with torch.no_grad():
        got = model(INPUTS).logits
    # Bit for bit on the machine that made them; another one's matrix products round otherwise.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * (1 + float(want.abs().max())))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path).eval()(INPUTS).logits, got)
