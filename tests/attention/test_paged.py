"""Continuous batching on heads per layer raises before anything runs, where Transformers returns empty answers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from support.models import build
from transformers import PreTrainedModel

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads

OWN = "init_continuous_batching"


def converted() -> PreTrainedModel:
    model = build("llama", "causal")
    convert_to_gqa(model, [4, 2])
    return model


def pruned() -> PreTrainedModel:
    model = build("gpt2", "causal")
    prune_heads(model, {0: [1], 1: [2]})
    return model


@pytest.mark.parametrize("make", [converted, pruned])
def test_heads_per_layer_are_refused(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    for one in (model, copy.deepcopy(model), load_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"continuous batching .*layers have .* key/value heads, and the paged"):
            one.generate_batch([[1, 2, 3]], max_new_tokens=2)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_a_model_that_fits_is_left_alone(tmp_path: Path) -> None:
    model = build("llama", "causal")
    convert_to_gqa(model, 2)
    model.save_pretrained(tmp_path)
    assert OWN not in vars(model) and OWN not in vars(load_pretrained(tmp_path))


def test_it_fits_again_after_another_change() -> None:
    model = converted()
    assert OWN in vars(model)
    convert_to_gqa(model, 2)
    assert OWN not in vars(model)
