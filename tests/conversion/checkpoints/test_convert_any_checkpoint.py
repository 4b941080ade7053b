"""Streamed conversion of models that no table knows: tensors and config are those of the conversion in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.every_type import CLASSES, small_config, small_model
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads
from hf_attnkit.conversion import Statistics, convert_checkpoint
from hf_attnkit.conversion.checkpoints import likeness
from hf_attnkit.conversion.checkpoints.source import Checkpoint
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.layers import projected_layers

Numbers = int | Sequence[int]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def deep(model_type: str, **options: Any) -> PreTrainedModel:
    """With more layers than the small model that is looked at."""
    config = small_config(CONFIG_MAPPING[model_type])
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, CLASSES[model_type])._from_config(config)
    return model.eval()


def statistics_of(folder: Path, path: Path) -> Path:
    model = load_pretrained(folder, dtype=torch.float32)
    inputs = {name: value.repeat(8, 1) for name, value in discover(model).inputs.items()
              if isinstance(value, Tensor) and value.dim() == 2}  # fmt: skip
    collect(model, projected_layers(model), [inputs, inputs]).save(path)
    return path


def check(model: PreTrainedModel, numbers: Numbers, tmp_path: Path, **options: Any) -> None:
    """Shard by shard and in memory, bit for bit."""
    with_statistics = options.pop("statistics", False)
    source, target, expected = (tmp_path / name for name in ("in", "out", "expected"))
    model.save_pretrained(source, max_shard_size="40KB")
    file = statistics_of(source, tmp_path / "statistics") if with_statistics else None
    report = convert_checkpoint(source, target, numbers, statistics=file, **options)
    loaded = load_pretrained(source)
    convert_to_gqa(loaded, numbers, calibration=None if file is None else Statistics.load(file), **options)
    loaded.save_pretrained(expected)
    found, wanted = tensors(target), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert json.loads((target / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    given = list(numbers) if isinstance(numbers, Sequence) else [numbers] * len(report.heads_after)
    assert list(report.heads_after) == given
    again = load_pretrained(target).eval()
    with torch.no_grad():
        inputs = discover(loaded).inputs
        for a, b in zip(again(**inputs).values(), loaded.eval()(**inputs).values(), strict=False):
            if isinstance(a, Tensor):
                assert torch.equal(a, b)


CASES: dict[str, tuple[str, Numbers, dict[str, Any]]] = {
    "gpt2, transposed and fused": ("gpt2", 2, {"method": "mean"}),
    "gpt2, another basis": ("gpt2", 1, {"method": "pca"}),
    "gpt2, calibrated": ("gpt2", 2, {"statistics": True}),
    "gpt2, layers alike no more": ("gpt2", [4, 2], {}),
    "mixtral": ("mixtral", 1, {"method": "pca"}),
    "mixtral, calibrated": ("mixtral", 1, {"statistics": True}),
    "gemma2": ("gemma2", 1, {"method": "pca"}),
    "gpt_oss, sinks": ("gpt_oss", 1, {"method": "mean"}),
    "bart, cross-attention": ("bart", 2, {"method": "procrustes"}),
    "bart, calibrated": ("bart", 2, {"statistics": True, "method": "pca"}),
    "bart, numbers by layer": ("bart", [2, 4, 4, 1, 2, 4], {}),
    "t5, a bias for each head": ("t5", 2, {}),
    "opt, as many heads in another basis": ("opt", 4, {"statistics": True, "method": "pca"}),
    "clip, two parts with configs of their own": ("clip", 2, {}),
    "llava": ("llava", 1, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_config_are_those_of_the_conversion_in_memory(case: str, tmp_path: Path) -> None:
    model_type, numbers, options = CASES[case]
    check(small_model(model_type), numbers, tmp_path, **options)


DEEP: dict[str, tuple[dict[str, Any], Numbers, dict[str, Any]]] = {
    "gpt2": ({"n_layer": 7, "vocab_size": 300, "n_inner": 128}, 2, {}),
    "mixtral": ({"num_hidden_layers": 5}, [1, 2, 1, 2, 1], {}),
    "smollm3": ({"num_hidden_layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": ["full_attention"] * 8},
                1, {"method": "pca"}),
    "whisper": ({"encoder_layers": 4, "decoder_layers": 3, "num_hidden_layers": 4}, 2, {"method": "pca"}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", DEEP)
def test_many_layers_are_told_by_few(model_type: str, tmp_path: Path) -> None:
    """In SmolLM3 every fourth layer does not rotate: two layers do not show all kinds, four do."""
    sizes, numbers, options = DEEP[model_type]
    model = deep(model_type, **sizes)
    check(model, numbers, tmp_path, **options)
    checkpoint = Checkpoint(tmp_path / "in")
    assert checkpoint.small is not None
    small = checkpoint.small._small
    assert len(checkpoint.small.likenesses) == len(discover(model).attentions)
    assert len(discover(small).attentions) < len(checkpoint.small.likenesses)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_in_bfloat16(tmp_path: Path) -> None:
    check(small_model("gpt2").to(torch.bfloat16), 2, tmp_path, method="pca")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("opt", "does not run with fewer heads"),
        ("gpt_neox", "does not run with fewer heads"),
        ("modernbert", "does not run with fewer heads"),
        ("falcon", "never calls Transformers' attention interface"),
        ("deepseek_v3", "latent attention"),
        ("olmo2", r"q_proj\.weight: every query head depends on all of it"),
    ],
)
def test_what_memory_refuses_is_refused_before_anything_is_written(
    model_type: str, message: str, tmp_path: Path
) -> None:
    model = small_model(model_type)
    number = 1 if model_type == "olmo2" else 2
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", number)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError):
        convert_to_gqa(model, number)


def test_heads_that_were_changed_before(tmp_path: Path) -> None:
    """Plain again, it is converted again; with numbers that only a record says, it is refused by name."""
    convert_to_gqa(small_model("gpt2"), 2).save_pretrained(tmp_path / "recorded")
    assert json.loads((tmp_path / "recorded" / "config.json").read_text())["hf_attnkit"]["heads"]["layers"]
    with pytest.raises(ValueError, match="records other numbers of heads"):
        convert_checkpoint(tmp_path / "recorded", tmp_path / "out", 1)
    plain = small_model("mixtral")
    prune_heads(plain, {each.index: [2, 3] for each in discover(plain).attentions})
    assert plain.config.hf_attnkit["heads"] == {}
    check(prune_heads(deep("mixtral", num_key_value_heads=4), {0: [1, 3], 1: [1, 3]}), 1, tmp_path)


def test_a_class_of_which_no_small_one_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model("gpt2").save_pretrained(tmp_path / "in")

    def none(config: object) -> PreTrainedModel:
        raise RuntimeError("sizes that do not fit")

    monkeypatch.setattr(likeness, "random_model", none)
    with pytest.raises(ValueError, match=r"no small GPT2LMHeadModel tells .*sizes that do not fit.*load_pretrained"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", 2)
