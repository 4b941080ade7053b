"""Conversion by shards: the same tensors as in memory, files complete or absent, bad input refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import collect_statistics
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import EDITABLE, SAMPLES, batch, build
from support.subprocesses import finished_python
from torch import Tensor

from hf_attnkit import convert_to_gqa, load_pretrained
from hf_attnkit.conversion import METHODS, Statistics, convert_checkpoint
from hf_attnkit.conversion.checkpoints import safetensors_stream
from hf_attnkit.conversion.checkpoints.safetensors_stream import Reader, Writer
from hf_attnkit.conversion.checkpoints.source import MARKER
from hf_attnkit.conversion.methods.table import transforms
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.models.layers import projected_layers

# Every family with the method that changes least or the one that changes most, in shards or in 16 bits; all methods
# with a family that has biases and no rotation in both.
SHARD = "40KB"
FORMS = ((torch.float32, SHARD), (torch.bfloat16, "5GB"))
CASES = [
    (family, ("mean", "pca+statistics")[number % 2], FORMS[number // 2 % 2 :][:1])
    for number, family in enumerate(EDITABLE)
]
CASES += [("bert", method, FORMS) for method in METHODS if method != "random"] + [("phi3", "pca+statistics", FORMS)]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved(folder: Path, family: str = "llama", size: str = SHARD, **options: Any) -> Path:
    build(family, **options).save_pretrained(folder / "in", max_shard_size=size)
    return folder / "in"


def statistics_of(folder: Path, path: Path) -> Path:
    model = load_pretrained(folder, dtype=torch.float32)
    collect(model, projected_layers(model), [batch(model, seed=seed) for seed in range(6)]).save(path)
    return path


@pytest.mark.parametrize(("family", "method", "forms"), CASES)
def test_tensors_and_config_are_those_of_the_conversion_in_memory(
    family: str, method: str, forms: Any, tmp_path: Path
) -> None:
    method, _, with_statistics = method.partition("+")
    options: dict[str, Any] = {"method": method}
    if family == "qwen3" and method in ("pca", "procrustes"):
        options["key_method"] = "mean"
    for dtype, size in forms:
        source, target, expected = (tmp_path / f"{name} {size}" for name in ("in", "out", "expected"))
        build(family, list(SAMPLES[family].classes)[-1]).to(dtype).save_pretrained(source, max_shard_size=size)
        file = statistics_of(source, tmp_path / "statistics") if with_statistics else None
        report = convert_checkpoint(source, target, 2, statistics=file, **options)
        model = load_pretrained(source)
        convert_to_gqa(model, 2, calibration=Statistics.load(file) if file else None, **options)
        model.save_pretrained(expected)
        found, wanted = tensors(target), tensors(expected)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype == dtype
            assert torch.equal(found[name], tensor), name
        assert json.loads((target / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
        assert load_pretrained(target).dtype == dtype
        assert report.bytes_after * 4 == report.bytes_before
        assert report.heads_before == (8,) * len(report.heads_after) and set(report.heads_after) == {2}
        if size == SHARD:
            old, new = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, target))
            assert len(set(new["weight_map"].values())) > 3 and old["weight_map"] == new["weight_map"]
            assert new["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
            assert new["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in wanted.values())


def test_grouped_again_base_names_other_files_and_metadata(tmp_path: Path) -> None:
    """A grouped model; tensors without the base model's prefix under a class with a head; what else is in a folder."""
    source = saved(tmp_path, kv_heads=4, size="5GB")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("")
    (source / "folder").mkdir()
    convert_checkpoint(source, tmp_path / "out", [2, 1])
    assert sorted(files(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model = load_pretrained(source)
    convert_to_gqa(model, [2, 1])
    model.save_pretrained(tmp_path / "expected")
    wanted = {name.removeprefix("model."): tensor for name, tensor in tensors(tmp_path / "expected").items()}
    found = tensors(tmp_path / "out")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items()) and "layers.1.mlp" in str(found)


class Failure(Exception):
    """What the tests throw in the middle."""


@pytest.mark.parametrize("error", [Failure(), OSError(28, "No space left on device")], ids=["failure", "full disk"])
def test_interrupted_anywhere_and_started_again(error: Exception, tmp_path: Path, monkeypatch) -> None:
    source = saved(tmp_path, size="100KB")
    convert_checkpoint(source, tmp_path / "whole", 2, method="pca")
    real, count = Writer._write, 0

    def counted(self: Writer, data: memoryview) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise error
        real(self, data)

    stop = -1
    monkeypatch.setattr(Writer, "_write", counted)
    convert_checkpoint(source, tmp_path / "counted", 2, method="pca")
    total, whole = count, files(tmp_path / "whole")
    assert total > 25
    for point in range(1, total + 1, 19):
        target, count, stop = tmp_path / f"out {point}", 0, point
        with pytest.raises(type(error)):
            convert_checkpoint(source, target, 2, method="pca")
        assert not (target / "config.json").exists() and (target / MARKER).exists()
        with pytest.raises((OSError, ValueError)):
            load_pretrained(target)
        with pytest.raises(ValueError, match="differs in num_key_value_heads"):
            convert_checkpoint(source, target, 4, method="pca")
        complete = {name for name in files(target) if name.endswith(".safetensors")}
        count, stop = 0, -1
        convert_checkpoint(source, target, 2, method="pca")
        assert files(target) == whole
        assert not complete or count < total, "finished shards were written again"


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors.index.json", "config.json"])
def test_interrupted_after_the_shards(name: str, tmp_path: Path, monkeypatch) -> None:
    """When this file is complete but for its name."""
    source = saved(tmp_path, size="100KB")
    (source / "tokenizer.json").write_text("{}")
    real = safetensors_stream.rename

    def rename(path: Path) -> None:
        if path.name == name:
            raise Failure
        real(path)

    monkeypatch.setattr(safetensors_stream, "rename", rename)
    with pytest.raises(Failure):
        convert_checkpoint(source, tmp_path / "out", 2)
    with pytest.raises((OSError, ValueError)):
        load_pretrained(tmp_path / "out")
    monkeypatch.undo()
    convert_checkpoint(source, tmp_path / "out", 2)
    convert_checkpoint(source, tmp_path / "whole", 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
def test_killed(tmp_path: Path) -> None:
    """The process is killed when its second shard is half written."""
    source = saved(tmp_path, size="100KB")
    code = """
    import os, signal, sys
    from hf_attnkit.conversion.checkpoints.safetensors_stream import Writer
    from hf_attnkit.conversion import convert_checkpoint
    real = Writer._write
    def write(self, data):
        real(self, data)
        if "00002" in self.path.name and self._missing < sum(e.nbytes for e in self.entries.values()) / 2:
            os.kill(os.getpid(), signal.SIGKILL)
    Writer._write = write
    convert_checkpoint(sys.argv[1], sys.argv[2], 2)
    """
    assert finished_python(code, source, tmp_path / "out").returncode == -9
    assert len([name for name in files(tmp_path / "out") if name.endswith(".safetensors")]) == 1
    with pytest.raises((OSError, ValueError)):
        load_pretrained(tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", 2)
    convert_checkpoint(source, tmp_path / "whole", 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("method", [name for name in METHODS if not transforms(name) and name != "random"])
@pytest.mark.parametrize("family", ["bert", "phi3"])
def test_queries_and_outputs_that_stay_are_copied_byte_by_byte(family: str, method: str, tmp_path: Path) -> None:
    """A NaN with a payload, which no conversion of dtypes keeps, comes through."""
    model = build(family).bfloat16()
    bits = torch.tensor(0x7FA5, dtype=torch.int16)
    layers = projected_layers(model)
    for layer in layers:
        for linear, rows in ((layer.query, layer.rows("query")), (layer.output, layer.rows("output"))):
            for parameter in linear.parameters():
                parameter.data.view(torch.int16)[rows[-1] if isinstance(rows, Tensor) else -1] = bits
    assert bits.view(torch.bfloat16).double().bfloat16().view(torch.int16) != bits
    model.save_pretrained(tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, method=method)
    found, compared = tensors(tmp_path / "out"), 0
    for name, old in tensors(tmp_path / "in").items():
        assert old.dtype == torch.bfloat16
        changed = [part for part in ("qkv_proj", "key", "value") if f".{part}." in name]
        rows = layers[0].rows("query") if changed == ["qkv_proj"] else slice(None)
        if changed in ([], ["qkv_proj"]):
            assert torch.equal(found[name][rows].view(torch.int16), old[rows].view(torch.int16)), name
            compared += bool((old[rows].view(torch.int16) == bits).any())
    assert compared == len(layers) * (4 if family == "bert" else 2)


def test_report_says_what_was_converted(tmp_path: Path) -> None:
    source = saved(tmp_path, size="5GB")
    report = convert_checkpoint(source, tmp_path / "same", 2, method="pca", key_method="mean")
    assert str(report) == (
        "key/value heads 8 -> 2 in each of 2 layers\n"
        "method pca (keys: mean), no calibration; "
        f"cache {report.bytes_before:,} -> {report.bytes_after:,} bytes per token"
    )
    assert str(convert_checkpoint(source, tmp_path / "different", [4, 2])).startswith(
        "key/value heads layer 0: 8 -> 4, layer 1: 8 -> 2\n"
    )


def test_bad_input_is_refused_and_nothing_written(tmp_path: Path) -> None:
    source, target = saved(tmp_path, size="5GB"), tmp_path / "out"
    good = statistics_of(source, tmp_path / "statistics")
    bad = Statistics.load(good)
    bad.second_moments[1][0, 0] = torch.nan
    bad.save(tmp_path / "nan")
    Statistics(bad.second_moments[:1], 100).save(tmp_path / "other")

    def refused(message: str, given: Path = source, number: int = 2, **options: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert_checkpoint(given, target, number, **options)
        assert not target.exists()

    refused("num_key_value_heads=3", number=3)
    refused("unknown method 'median'", method="median")
    refused("'random' draws", method="random")
    refused("no data", method="mean", statistics=good)
    refused("of 1 layers", method="pca", statistics=tmp_path / "other")
    refused("layer 1: .* NaN", method="pca", statistics=tmp_path / "nan")
    refused("nowhere", method="pca", statistics=tmp_path / "nowhere")
    refused("no calibration statistics", method="pca", statistics=source / "model.safetensors")
    refused("config.json", given=tmp_path)
    with pytest.raises(ValueError, match="same folder"):
        convert_checkpoint(source, source, 2)
    refused("k_norm.*key_method", given=saved(tmp_path / "qwen3", "qwen3"), method="pca")
    refused("does not run with fewer heads", given=saved(tmp_path / "gpt_neox", "gpt_neox"))

    config = json.loads((source / "config.json").read_text())
    for change, message in (
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}, "has the shape"),
        ({"architectures": None}, "names no class"),
    ):
        (source / "config.json").write_text(json.dumps(config | change))
        refused(message)
    (source / "config.json").write_text(json.dumps(config))

    weights = source / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    refused("truncated")
    weights.write_bytes(b"abc")
    refused("no complete safetensors")
    weights.write_bytes(content.replace(b"layers.1.self_attn.k_proj.weight", b"layers.1.self_attn.k_prox.weight"))
    refused("no tensor 'layers.1.self_attn.k_proj.weight'")
    weights.rename(source / "pytorch_model.bin")
    refused("another format .*pytorch_model.bin.*save_pretrained")

    target.mkdir()
    (target / "notes").write_text("")
    (source / "pytorch_model.bin").write_bytes(content)
    (source / "pytorch_model.bin").rename(weights)
    with pytest.raises(ValueError, match="not empty"):
        convert_checkpoint(source, target, 2)
    assert list(files(target)) == ["notes"]


def test_reader_and_writer_agree_with_the_library(tmp_path: Path) -> None:
    """Rows in any order; a file that is not complete does not get its name."""
    given = {"a": torch.randn(5, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor([1, 2]), "d": torch.zeros(0, 2)}
    from safetensors.torch import save_file

    save_file(given, tmp_path / "old", metadata={"x": "ü"})
    reader = Reader(tmp_path / "old")
    assert torch.equal(reader.rows("a", slice(1, 3)), given["a"][1:3]) and torch.equal(reader.rows("b"), given["b"])
    with Writer(tmp_path / "new", reader.entries, reader.metadata) as writer:
        writer.rows("a", given["a"][2:], 2)
        for name in ("c", "b", "d"):
            writer.copy(reader, name)
        writer.rows("a", given["a"][:2])
    assert all(torch.equal(value, given[name]) for name, value in load_file(tmp_path / "new").items())
    assert Reader(tmp_path / "new").metadata == {"x": "ü"}
    with pytest.raises(RuntimeError, match="not written"), Writer(tmp_path / "short", reader.entries) as writer:
        writer.copy(reader, "a")
    assert not (tmp_path / "short").exists()


def test_statistics_are_collected_from_text(tmp_path: Path, monkeypatch) -> None:
    source, target, text = saved(tmp_path, size="5GB"), tmp_path / "statistics", tmp_path / "text"
    text.write_text("one two\n\nthree\nfour five six\nnever\n")

    class Tokenizer:
        def __call__(self, line: str, max_length: int, **options: Any) -> dict[str, Tensor]:
            return {"input_ids": torch.tensor([[len(word) for word in line.split()][:max_length]])}

    monkeypatch.setattr(collect_statistics.AutoTokenizer, "from_pretrained", lambda path: Tokenizer())
    collect_statistics.write_statistics(str(source), target, text, 5, 2)
    model = load_pretrained(source)
    ids = ([3, 3], [5], [4, 4])
    expected = collect(model, projected_layers(model), [{"input_ids": torch.tensor([i])} for i in ids])
    found = Statistics.load(target)
    assert found.num_tokens == 5
    for a, b in zip(found.second_moments, expected.second_moments, strict=True):
        assert torch.equal(a, b.float().double())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        collect_statistics.write_statistics(str(source), tmp_path / "x", tmp_path / "nowhere", 5, 2)
