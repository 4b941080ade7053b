"""What a pruned model must equal."""

from __future__ import annotations

import copy

import torch
from support.accuracy import assert_as_accurate
from support.models import outputs
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.models.layers import projected_layers

UNEVEN = {0: [1, 3, 4], 1: [0, 2, 5, 6, 7]}


# For groups of 4: a whole group in layer 0, two heads of each group in layer 1.
GROUPED = {0: [4, 5, 6, 7], 1: [0, 2, 5, 6]}


def zeroed(model: PreTrainedModel, heads: dict[int, list[int]]) -> PreTrainedModel:
    """A copy in which the output projection ignores these heads."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in projected_layers(model):
            for head in heads.get(layer.index, []):
                layer.output.weight[:, head * layer.head_dim : (head + 1) * layer.head_dim] = 0
    return model


def assert_same(model: PreTrainedModel, reference: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    exact = outputs(copy.deepcopy(reference).double(), inputs).detach()
    assert_as_accurate(outputs(model, inputs).detach(), outputs(reference, inputs).detach(), exact, terms=96)


def numbers(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(layer.num_heads, layer.num_key_value_heads) for layer in projected_layers(model)]
