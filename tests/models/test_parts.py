"""A part of a model that is changed alone: the whole runs, is saved, and comes back whole, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cutting import a_group
from support.every_type import small_model
from support.unchanged import unchanged
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads, restore_attention, swap_attention
from hf_attnkit.attention.kind import ATTRIBUTE, Kind
from hf_attnkit.models.discovery import discover, run_outputs
from hf_attnkit.models.ownership import ownerships

PARTS = {
    "t5": "encoder",
    "clip": "vision_model",
    "bart": "model.encoder",
    "llava": "model.language_model",
    "whisper": "model.decoder",
}


def prune(part: PreTrainedModel) -> None:
    """A group of each attention."""
    found = discover(part)
    owned = ownerships(part, found.attentions)
    prune_heads(
        part, {each.index: a_group(each.num_heads, own) for each, own in zip(found.attentions, owned, strict=True)}
    )


def swap(part: PreTrainedModel) -> None:
    swap_attention(part, "flash")


def convert(part: PreTrainedModel) -> None:
    convert_to_gqa(part, 1)


def outputs(model: PreTrainedModel, inputs: dict) -> list[Tensor]:
    with torch.no_grad():
        return run_outputs(model, inputs)


def kinds(model: PreTrainedModel) -> dict[str, str]:
    """By path, what was swapped in."""
    return {path: m.__dict__[ATTRIBUTE].name for path, m in model.named_modules()
            if isinstance(m.__dict__.get(ATTRIBUTE), Kind)}  # fmt: skip


@pytest.mark.parametrize("changes", [(prune,), (convert,), (swap,), (swap, prune), (prune, swap)],
                         ids=lambda changes: ", ".join(each.__name__ for each in changes))  # fmt: skip
@pytest.mark.parametrize("model_type", PARTS)
def test_saved_whole_and_loaded_whole(
    model_type: str, changes: tuple[Callable[[PreTrainedModel], None], ...], tmp_path: Path
) -> None:
    model, path = small_model(model_type), PARTS[model_type]
    inputs = discover(model).inputs
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stock = outputs(model, inputs)
    for change in changes:
        change(model.get_submodule(path))
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{path}."):
            assert torch.equal(parameter, before[name]), name
    want = outputs(model, inputs)
    off = [(a - b).abs().max() > 1e-4 * b.abs().max() for a, b in zip(want, stock, strict=True)]
    assert any(off) == (changes != (swap,))
    swapped = kinds(model)
    assert bool(swapped) == (swap in changes) and all(name.startswith(f"{path}.") for name in swapped)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, type(model)).eval()
    assert kinds(again) == swapped
    for a, b in zip(outputs(again, inputs), want, strict=True):
        assert torch.equal(a, b)
    again.save_pretrained(tmp_path / "again")
    third = load_pretrained(tmp_path / "again", type(model)).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(third, inputs), want, strict=True))


@pytest.mark.parametrize("model_type", PARTS)
def test_layers_of_a_part_are_counted_and_named_within_it(model_type: str) -> None:
    model, path = small_model(model_type), PARTS[model_type]
    part = model.get_submodule(path)
    # In the order in which the whole calls them: Whisper's decoder alone has no cross-attention.
    first, second = [a.path.removeprefix(f"{path}.") for a in discover(model).attentions if a.path.startswith(path)][:2]
    assert swap_attention(part, "flash", layers=[1]) is part
    assert kinds(part) == {second: "flash"} and len(kinds(model)) == 1
    swap_attention(part, {first: "mha"})
    assert kinds(part) == {first: "mha", second: "flash"}
    with unchanged(part), pytest.raises(ValueError, match="out of range"):
        swap_attention(part, "flash", layers=[99])
    inputs = discover(model).inputs
    outputs(model, inputs)
    assert restore_attention(part) is part
    assert not kinds(model) and not any("hf_attnkit" in vars(m.config) for m in model.modules() if hasattr(m, "config"))
    outputs(model, inputs)


def test_a_part_after_the_whole() -> None:
    """What the rest of the whole runs stays."""
    model = small_model("bart")
    swap_attention(model, "mha")
    swap_attention(model.model.encoder, "flash")
    found = kinds(model)
    assert {name for path, name in found.items() if ".encoder." in path} == {"flash"}
    assert {name for path, name in found.items() if ".decoder." in path} == {"mha"}
