"""Changes of heads on a GPU: their proofs pass, whatever precision the process allows, and weights are the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gpu import DEVICE, ON_GPU, back, needs_gpu, tf32, there
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor

from hf_attnkit import convert_to_gqa, prune_heads, swap_attention
from hf_attnkit.editing import proof
from hf_attnkit.refitting import refit

pytestmark = needs_gpu

Batches = list[dict[str, Tensor]]
HEADS = {"bert": {0: [0, 3], 1: [5]}, "llama": {0: [0, 1], 1: [4, 5]}}
CHANGES: dict[str, Callable[[Any, str, Batches], Any]] = {
    "swap": lambda model, family, data: swap_attention(model, "flash"),
    "window": lambda model, family, data: swap_attention(model, "sliding_window", window=5),
    "window, refitted": lambda model, family, data: swap_attention(
        model, "sliding_window", window=5, calibration=data, refit="output"
    ),
    "pruned": lambda model, family, data: prune_heads(model, HEADS[family]),
    "pruned, refitted": lambda model, family, data: prune_heads(model, HEADS[family], calibration=data, refit="output"),
    "pruned, scaled": lambda model, family, data: prune_heads(model, HEADS[family], calibration=data, refit="scale"),
    "mean": lambda model, family, data: convert_to_gqa(model, 2, method="mean"),
    "procrustes": lambda model, family, data: convert_to_gqa(model, 2, method="procrustes"),
    "pca": lambda model, family, data: convert_to_gqa(model, 2, calibration=data, refit="none"),
    "pca, output": lambda model, family, data: convert_to_gqa(model, 2, calibration=data, refit="output"),
    "pca, best groups": lambda model, family, data: convert_to_gqa(
        model, 2, calibration=data, refit="none", grouping="best"
    ),
    "pca, full": lambda model, family, data: convert_to_gqa(model, 2, calibration=data, refit="full", grouping="best"),
}


def example(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Batches]:
    model = build(family, "sequence", 8, 4) if family == "llama" else build(family, "sequence")
    return model.to(dtype), [batch(model, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("allowed", ["off", "switch", "name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_proofs_pass(family: str, dtype: torch.dtype, allowed: str) -> None:
    """Each change is proven before it returns: none is refused for the rounding of a GPU."""
    model, data = example(family, dtype)
    moved = there(model)
    with tf32(allowed):
        for change in CHANGES.values():
            changed = change(copy.deepcopy(moved), family, data)
            assert all(p.device.type == torch.device(DEVICE).type for p in changed.parameters())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_proofs_pass_under_autocast(family: str) -> None:
    model, data = example(family)
    moved = there(model)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        for name in ("swap", "pruned", "mean", "pca, output"):
            CHANGES[name](copy.deepcopy(moved), family, data)


@pytest.mark.parametrize("allowed", ["off", "switch"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_models_are_the_cpus(name: str, family: str, allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they put out: bases of eigenvectors may differ in sign, models may not."""
    draw = torch.multinomial

    def draw_on_the_cpu(probability: Tensor, number: int, *, generator: torch.Generator) -> Tensor:
        return draw(probability.cpu(), number, generator=torch.Generator().manual_seed(0)).to(probability.device)

    # The keys that "pca, full" fits queries to: a GPU's generator draws others.
    monkeypatch.setattr(torch, "multinomial", draw_on_the_cpu)
    model, data = example(family)
    model = model.double()  # rotary embeddings and norms stay in float32: 1e-6 of logits of about 10
    inputs = data[0]
    want = CHANGES[name](copy.deepcopy(model), family, data)(**inputs).logits
    with tf32(allowed):
        changed = CHANGES[name](there(model), family, data)
    found = back(changed(**there(inputs)).logits)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["pruned", "mean"])
def test_weights_are_the_cpus(name: str) -> None:
    model, data = example("llama")
    want, found = (CHANGES[name](each, "llama", data).state_dict() for each in (copy.deepcopy(model), there(model)))
    for key, value in want.items():
        torch.testing.assert_close(back(found[key]), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_after_an_error_the_model_is_bit_for_bit_as_it_was(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = example(family)
    moved = there(model)
    monkeypatch.setattr(proof.Zeroed, "difference", lambda self: "is wrong")
    with unchanged(moved), pytest.raises(ValueError, match="is wrong"):
        prune_heads(moved, HEADS[family], calibration=data, refit="output")
    monkeypatch.undo()
    monkeypatch.setattr(refit, "OutputSums", broken)
    for change in ("pruned, refitted", "pca, output", "window, refitted"):
        with unchanged(moved), pytest.raises(RuntimeError, match="broken"):
            CHANGES[change](moved, family, data)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken")


def test_generators_of_the_device_are_left_alone() -> None:
    model, data = example("llama")
    moved = there(model)
    state = torch.cuda.get_rng_state() if ON_GPU else torch.get_rng_state()
    for name in ("swap", "pruned", "pca, full"):
        CHANGES[name](copy.deepcopy(moved), "llama", data)
    assert torch.equal(state, torch.cuda.get_rng_state() if ON_GPU else torch.get_rng_state())
