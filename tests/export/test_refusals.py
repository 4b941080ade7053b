"""What cannot be exported right is refused with the reason, and nothing is left behind."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from support.models import build
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from hf_attnkit import swap_attention
from hf_attnkit.cli import main
from hf_attnkit.export import export_onnx, onnx_file
from hf_attnkit.export.inputs import compared_inputs, input_names
from hf_attnkit.export.proof import compare
from hf_attnkit.loading import skeleton

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def nothing_left(folder: Path) -> bool:
    return not any(folder.iterdir())


def random_blocks() -> PreTrainedModel:
    return swap_attention(build("bert"), "local_global", window=4, num_random_blocks=1, block_size=4)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "meta": (lambda: skeleton(BertConfig(architectures=["BertModel"])), {}, "on the meta device, without values"),
    "bfloat16": (lambda: build("bert").bfloat16(), {}, r"is in bfloat16, cpu, and .*model.to\('cpu', torch.float32\)"),
    "two graphs": (lambda: build("t5"), {}, "an encoder and a decoder, two graphs"),
    "images": (lambda: build("vit"), {}, "reads 'pixel_values'; only models that read text"),
    "old opset": (lambda: build("bert"), {"opset": 11}, "opset=11 must be an integer from 18 to"),
    "future opset": (lambda: build("bert"), {"opset": 1000}, "opset=1000 must be an integer from 18 to"),
    "precision": (lambda: build("bert"), {"precision": "int4"}, "precision.*'int4'.*float32"),
    "skip without int8": (lambda: build("bert"), {"int8_skip_modules": ["*.key"]}, "no effect with .*float32"),
    "one pattern": (lambda: build("bert"), {"precision": "int8", "int8_skip_modules": "*.key"}, "must be a list of"),
    "cache of 8 bits": (
        lambda: swap_attention(build("llama"), "gqa", cache_dtype="int8"),
        {},
        r"runs 'gqa' attention \(cache_dtype='int8'\), and the cache of a file .* cache_dtype=None",
    ),
    "no expression": (random_blocks, {}, "BertModel cannot be exported: ValueError: .*num_random_blocks=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    make, options, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        export_onnx(make(), tmp_path / "out", **options)
    assert nothing_left(tmp_path)


def test_only_models() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        export_onnx(nn.Linear(2, 2), "never")


def test_a_model_without_a_token_of_padding_says_so(tmp_path: Path) -> None:
    """Transformers' own reason arrives."""
    model = build("llama", "sequence", pad_token_id=None)
    with pytest.raises(ValueError, match=r"cannot be exported: ValueError: .*padding token"):
        export_onnx(model, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("content", ["file", "folder"])
def test_a_target_that_holds_something_else_is_kept(content: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if content == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no folder" if content == "file" else "holds mine.txt; name another"):
        export_onnx(build("bert"), target)
    kept = target if content == "file" else target / "mine.txt"
    assert kept.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]


def made(monkeypatch: pytest.MonkeyPatch, save: Callable[..., None]) -> None:
    """Take a trace for done, and save by this."""
    from transformers.exporters import ExportedModel

    exported = create_autospec(ExportedModel, instance=True)
    exported.save_pretrained.side_effect = save
    fake = create_autospec(onnx_file._export_encoder, return_value=exported)
    monkeypatch.setattr(onnx_file, "_export_encoder", fake)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    made(monkeypatch, save)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(build("bert"), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_what_is_killed_while_writing_never_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def save(folder: Path) -> None:
        seen.append((tmp_path / "out").exists())
        raise KeyboardInterrupt

    made(monkeypatch, save)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(build("bert"), tmp_path / "out")
    assert seen == [False] and nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda name, x: x + 1e-3, "of the file differs from the model's by 1.0e-03, more than .*rounding explains"),
        (lambda name, x: x[:, :1], r"has the shape \(1, 1, .*and not \(1, 5"),
        (lambda name, x: x * float("nan"), "of the file is not finite"),
    ],
)
def test_a_file_that_is_not_the_model_is_found(wrong: Callable[..., Any], reason: str) -> None:
    model = build("bert", "token")
    given = list(compared_inputs(model, input_names(model, None)))

    def run(**inputs: Any) -> dict[str, Any]:
        return {name: wrong(name, value) for name, value in model(**inputs).items()}

    with torch.no_grad(), pytest.raises(ValueError, match=reason):
        compare(model, run, given, torch.float32)


def test_a_file_that_is_pinned_to_a_length_is_found() -> None:
    model = build("bert", "token")

    def run(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] != 5:
            raise RuntimeError("Non-zero status code\nmore")
        return model(**inputs)

    given = list(compared_inputs(model, input_names(model, None)))
    with torch.no_grad(), pytest.raises(ValueError, match=r"40 tokens the file does not run: .*Non-zero status code$"):
        compare(model, run, given, torch.float32)


def test_padding_and_lengths_are_others_than_the_traced_ones() -> None:
    model = build("bert")
    given = list(compared_inputs(model, input_names(model, ["input_ids", "token_type_ids"])))
    shapes = {tuple(one["input_ids"].shape) for one in given}
    assert len({batch for batch, _ in shapes}) == 2 and len({length for _, length in shapes}) == 3
    assert (2, 24) not in shapes
    assert all((one["attention_mask"] == 0).any() and one["token_type_ids"].any() for one in given)


def test_without_the_extra_the_command_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def missing(name: str, package: str | None = None) -> Any:
        return None if name == "onnxruntime" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "needs onnxruntime: pip install 'hf_attnkit[export]'" in capsys.readouterr().err


def test_the_command_refuses_before_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("bert").save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), str(tmp_path)])
    assert ended.value.code == 1 and "name another folder" in capsys.readouterr().err


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model: Any = BertModel(BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=20))
    model.train()
    with pytest.raises(ValueError, match="opset"):
        export_onnx(model, tmp_path / "out", opset=3)
    assert model.training
