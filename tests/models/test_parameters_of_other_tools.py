"""Projections whose parameters another tool computes or spreads: a sentence, and the model unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from support.models import batch, build
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import PreTrainedModel

import hf_attnkit


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('dist') / 'x'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spread(linear: nn.Linear) -> None:
    """As FSDP2 leaves it: a DTensor for a parameter."""
    mesh = init_device_mesh("cpu", (1,))
    linear.weight = nn.Parameter(DTensor.from_local(linear.weight.detach(), mesh, [Replicate()]))


TOOLS: dict[str, Callable[[nn.Linear], object]] = {
    "pruned weight": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.3),
    "pruned bias": lambda linear: prune.l1_unstructured(linear, "bias", amount=0.3),
    "old weight_norm": torch.nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrized bias": lambda linear: parametrize.register_parametrization(linear, "bias", nn.Identity()),
    "DTensor": spread,
}
CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "prune": lambda model: hf_attnkit.prune_heads(model, {1: [0]}),
    "convert": lambda model: hf_attnkit.convert_to_gqa(model, 2),
    "plan": lambda model: hf_attnkit.plan_gqa(model, 2),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tool", TOOLS)
def test_parameters_of_other_tools(tool: str, change: str, processes: None) -> None:
    model = build("bert")
    TOOLS[tool](model.encoder.layer[1].attention.self.key)
    what = "a DTensor" if tool == "DTensor" else "computed from other parameters"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"(layer 1 .*key: its (weight|bias)|layer\.1.*key\.weight) is {what}"):
        CHANGES[change](model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_taken_off_again() -> None:
    model = build("bert")
    key = model.encoder.layer[1].attention.self.key
    prune.l1_unstructured(key, "weight", amount=0.3)
    prune.remove(key, "weight")
    hf_attnkit.convert_to_gqa(model, 2)(**batch(model))
