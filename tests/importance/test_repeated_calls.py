"""Scores from the loss of modules that a model calls several times in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.every_type import small_model
from torch import Tensor

from hf_attnkit import head_importance
from hf_attnkit.models.known import known
from hf_attnkit.models.layers import attention_layers


@pytest.mark.parametrize("method", ["gradient", "taylor", "fisher"])
def test_a_module_that_all_layers_call(method: str) -> None:
    """ALBERT's: the head is what it is in all of its calls."""
    model = small_model("albert").double()
    (layer,) = attention_layers(model)
    calls: list[tuple[Tensor, Tensor]] = []
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))

    def watch(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        gates = torch.ones(*args[0].shape[:2], layer.num_heads, dtype=torch.float64, requires_grad=True)
        calls.append(gates)
        return ((args[0].unflatten(-1, (layer.num_heads, -1)) * gates[..., None]).flatten(-2),)

    labels = model(ids).logits.argmax(-1) if hasattr(model(ids), "logits") else None
    assert labels is not None
    handle = layer.output.register_forward_pre_hook(watch)
    loss = model(ids, labels=labels).loss
    handle.remove()
    assert len(calls) > 1
    gradients = [2 * gradient for gradient in torch.autograd.grad(loss, calls)]  # each example's own loss
    by_gate = sum(gradient.sum(1) for gradient in gradients)
    expected = {
        "gradient": by_gate.abs().mean(0),
        "fisher": by_gate.square().sum(0),
        "taylor": sum(gradient.abs().sum(1) for gradient in gradients).mean(0),
    }[method]
    found = head_importance(model, [{"input_ids": ids, "labels": labels}], method=method)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)


def test_calls_that_do_nothing_to_the_loss() -> None:
    """HRM runs its early cycles outside the graph."""
    model = small_model("hrm_text")
    found = head_importance(model, [known(model).discovery.inputs], method="taylor")
    assert found.isfinite().all() and (found > 0).any()
