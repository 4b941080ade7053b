"""What a swapped attention has learned outlives every change that leaves its heads as they are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.models import batch, build
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import convert_to_gqa, load_pretrained, restore_attention, swap_attention
from hf_attnkit.attention import swap
from hf_attnkit.attention.kind import PARAMETERS

HEDGEHOG = {"feature_map": "hedgehog"}


@pytest.fixture
def model() -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="linear attention is another function")
        model = swap_attention(build("llama", "causal"), "linear", **HEDGEHOG)
    with torch.no_grad():
        for parameter in maps(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


def maps(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if PARAMETERS in name}


def swapped(model: PreTrainedModel, name: str, **options: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="linear attention is another function")
        return swap_attention(model, name, **options)


@pytest.mark.parametrize("between", ["nothing", "restore", "flash", "elu", "refused", "one layer"])
def test_trained_maps_are_kept(between: str, model: PreTrainedModel, tmp_path, monkeypatch) -> None:
    trained = {name: parameter.clone() for name, parameter in maps(model).items()}
    if between == "restore":
        restore_attention(model)
    elif between == "flash":
        swap_attention(model, "flash")
    elif between == "elu":
        swapped(model, "linear")
    elif between == "one layer":
        swap_attention(model, "flash", layers=[1])
    elif between == "refused":
        monkeypatch.setattr(swap, "prove_swap", lambda *args: (_ for _ in ()).throw(ValueError("no")))
        for name, options in (("flash", {}), ("linear", {}), ("linear", HEDGEHOG | {"window": 2})):
            with pytest.raises(ValueError, match="no"):
                swapped(model, name, **options)
            assert all(torch.equal(parameter, trained[name]) for name, parameter in maps(model).items())
        monkeypatch.undo()
    if between in ("restore", "flash", "elu"):
        assert not maps(model) and not any(PARAMETERS in name for name in model.state_dict())
    swapped(model, "linear", **HEDGEHOG, window=4)
    assert maps(model).keys() == trained.keys()
    assert all(torch.equal(parameter, trained[name]) for name, parameter in maps(model).items())
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in maps(loaded).items())
    loaded(**batch(loaded))


def test_what_is_learned_besides_is_added_to_trained_maps(model: PreTrainedModel, tmp_path) -> None:
    """A gate and a decay start where they do, and the maps stay; all of it is kept, saved and loaded."""
    trained = {name: parameter.clone() for name, parameter in maps(model).items()}
    more = HEDGEHOG | {"window": 4, "gate": "learned", "decay": "learned"}
    swapped(model, "linear", **more)
    added = {name.split(".hf_attnkit_parameters.")[1] for name in maps(model).keys() - trained.keys()}
    assert added == {"gate.weight", "decay.weight", "decay.bias"}
    assert all(torch.equal(maps(model)[name], parameter) for name, parameter in trained.items())
    with torch.no_grad():
        for parameter in maps(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    further = {name: parameter.clone() for name, parameter in maps(model).items()}
    swapped(model, "linear", **HEDGEHOG)  # what is taken is what was trained last
    assert all(torch.equal(parameter, further[name]) for name, parameter in maps(model).items())
    swapped(model, "linear", **more, branches="linear")
    assert maps(model).keys() == further.keys()
    assert all(torch.equal(parameter, further[name]) for name, parameter in maps(model).items())
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config.hf_attnkit == model.config.hf_attnkit
    assert all(torch.equal(parameter, further[name]) for name, parameter in maps(loaded).items())
    assert torch.equal(loaded(**batch(loaded)).logits, model(**batch(model)).logits)


def test_maps_of_other_heads_are_not_taken_over(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"learned something for each head, .*change the heads first"):
        convert_to_gqa(model, 8, method="pca")
    restore_attention(model)
    convert_to_gqa(model, 8, method="pca", calibration=[batch(model)])  # as many heads, in other bases
    swapped(model, "linear", **HEDGEHOG)
    assert all((parameter[0] == torch.eye(8)).all() for name, parameter in maps(model).items() if "weight" in name)
