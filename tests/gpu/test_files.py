"""Changed models saved on a GPU and loaded straight to it; layers that are offloaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.gpu import DEVICE, ON_GPU, back, needs_gpu, there
from support.models import batch, build
from torch import Tensor

from hf_attnkit import convert_to_gqa, head_importance, load_pretrained, prune_heads, swap_attention

pytestmark = needs_gpu

# Two devices: the GPU and the CPU; in a rehearsal the CPU and the disk.
NEAR, FAR = (0, "cpu") if ON_GPU else ("cpu", "disk")
MAP = {"model.embed_tokens": NEAR, "model.layers.0": NEAR, "model.layers.1": FAR, "model.norm": NEAR,
       "model.rotary_emb": NEAR, "lm_head": NEAR}  # fmt: skip


def changed() -> torch.nn.Module:
    model = there(build("llama", "causal", 8, 4))
    prune_heads(model, {0: [0, 1]})
    return swap_attention(
        model, {0: ("sliding_window", {"window": 5}), 1: ("streaming_heads", {"heads": [1], "window": 4})}
    )


@torch.no_grad()
def test_saved_and_loaded_to_the_gpu(tmp_path: Path) -> None:
    model = changed()
    inputs = there(batch(model))
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    for options in ({"device_map": DEVICE}, {"device_map": "auto"}, {"device_map": {"": NEAR}}):
        loaded = load_pretrained(tmp_path, **options).eval()
        if options["device_map"] != "auto" or ON_GPU:
            assert loaded.device.type == torch.device(DEVICE).type
        # A loaded weight may be aligned otherwise, on which a product's rounding depends.
        torch.testing.assert_close(loaded(**inputs).logits, want, rtol=1e-5, atol=1e-4)
    onto_cpu = load_pretrained(tmp_path).eval()
    torch.testing.assert_close(onto_cpu(**back(inputs)).logits, back(want), rtol=1e-4, atol=1e-3)


def offloaded(folder: Path) -> torch.nn.Module:
    return load_pretrained(folder, device_map=MAP, offload_folder=str(folder / "offload")).eval()


@torch.no_grad()
def test_offloaded_layers_are_swapped(tmp_path: Path) -> None:
    stock = build("llama", "causal", 8, 4)
    stock.save_pretrained(tmp_path)
    inputs = batch(stock)
    want: Tensor = swap_attention(copy.deepcopy(stock), "sliding_window", window=5)(**inputs).logits
    model = offloaded(tmp_path)
    swap_attention(model, "sliding_window", window=5)
    real = inputs["attention_mask"].bool()
    found = model(**there(inputs)).logits.cpu()
    torch.testing.assert_close(found[real], want[real], rtol=1e-4, atol=1e-3)


def test_offloaded_heads_are_neither_cut_nor_scored(tmp_path: Path) -> None:
    build("llama", "causal", 8, 4).save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    for change in (
        lambda model: head_importance(model, [inputs]),
        lambda model: prune_heads(model, {0: [0, 1]}),
        lambda model: convert_to_gqa(model, 2, method="mean"),
    ):
        with pytest.raises(ValueError, match="offload"):
            change(offloaded(tmp_path))
