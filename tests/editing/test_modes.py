"""A change or a score made in inference mode, under autocast or with another default dtype is the one made without."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from support.models import build
from support.unchanged import unchanged
from torch import Tensor
from transformers import PreTrainedModel

import hf_attnkit


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 90, (4, 24), generator=generator)} for _ in range(2)]


def embedded(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    embed = model.get_input_embeddings()
    with torch.no_grad():
        return [{"inputs_embeds": embed(b["input_ids"]), "labels": b["input_ids"]} for b in batches()]


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "swap": lambda m: hf_attnkit.swap_attention(m, "linear", feature_map="hedgehog", window=3),
    "convert": lambda m: hf_attnkit.convert_to_gqa(m, 2, method="pca", calibration=batches(), refit="output"),
    "plan": lambda m: hf_attnkit.plan_gqa(m, 2, method="pca", calibration=batches()).apply(),
    "prune": lambda m: hf_attnkit.prune_heads(m, {0: [0, 1]}, calibration=batches()),
    "gradient": lambda m: hf_attnkit.head_importance(m, embedded(m), method="gradient"),
    "l0": lambda m: hf_attnkit.head_importance(m, batches(), method="l0", steps=3),
    "entropy_contribution": lambda m: hf_attnkit.head_importance(m, batches(), method="entropy_contribution"),
    "gradients": lambda m: hf_attnkit.head_gradients(m, batches()),
    "statistics": lambda m: hf_attnkit.head_statistics(m, batches()).entropy,
}


@functools.cache
def without_a_mode(name: str) -> Any:
    return CHANGES[name](build("llama", "causal"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHANGES)
def test_the_same_in_any_mode(name: str, mode: str) -> None:
    model = build("llama", "causal")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="linear attention is another function")
        wanted = without_a_mode(name)
        before = torch.get_default_dtype()
        with MODES[mode]():
            inside = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            found = CHANGES[name](model)
            after = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert inside == after and torch.get_default_dtype() == before
    if isinstance(wanted, Tensor):
        assert found.dtype == torch.float32 and torch.equal(found, wanted)
        return
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for one, two in zip(found.parameters(), wanted.parameters(), strict=True):
        assert one.dtype == two.dtype and one.requires_grad and not one.is_inference() and torch.equal(one, two)
    found(**batches()[0], labels=batches()[0]["input_ids"]).loss.backward()


@pytest.mark.parametrize("change", ["gradient", "l0", "descent", "token weights"])
def test_a_model_that_was_made_in_inference_mode(change: str) -> None:
    """PyTorch lets no gradient through it, and says so in its own words in the middle of the work."""
    with torch.inference_mode():
        model = build("llama", "causal", 8, 4)
    given = hf_attnkit.RefitOptions("output", token_weights="gradient")
    changes = CHANGES | {
        "descent": lambda m: hf_attnkit.convert_to_gqa(m, 2, calibration=batches(), refit="descent"),
        "token weights": lambda m: hf_attnkit.prune_heads(m, {0: [0, 1]}, calibration=batches(), refit=given),
    }
    with unchanged(model), pytest.raises(ValueError, match=r"made in inference mode.*load the model outside"):
        changes[change](model)
