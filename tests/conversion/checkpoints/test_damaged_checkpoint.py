"""Folders that are damaged, or whose files are elsewhere: refused with the file's name, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import build

from hf_attnkit.conversion import convert_checkpoint
from hf_attnkit.conversion.checkpoints.safetensors_stream import Reader, Writer
from hf_attnkit.conversion.checkpoints.source import INDEX, SINGLE

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "in", max_shard_size="40KB")
    return tmp_path / "in"


def refused(source: Path, message: str) -> None:
    target = source.with_name("out")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, target, 2)
    assert not target.exists()


@pytest.mark.parametrize("name", ["merges.txt", "config.json", INDEX, "shard"])
def test_links_out_of_the_folder(name: str, sharded: Path) -> None:
    path = sharded / name
    if name == "shard":
        path = min(sharded.glob("model-*.safetensors"))
    elsewhere = sharded.parent / "elsewhere"
    elsewhere.write_bytes(path.read_bytes() if path.exists() else b"not of this checkpoint")
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    refused(sharded, rf"{path.name} is a link to .*elsewhere")


def test_links_within_the_folder_and_the_hubs_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    (sharded / "vocab.txt").write_text("a")
    (sharded / "merges.txt").symlink_to(sharded / "vocab.txt")
    convert_checkpoint(sharded, tmp_path / "plain", 2)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sharded.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    convert_checkpoint(snapshot, tmp_path / "cached", 2)
    found = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("plain", "cached")]
    assert found[0] == found[1] and found[0]["merges.txt"] == b"a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index.update(weight_map={}), "no weight_map"),
        (lambda index: index.update(weight_map=[1]), "no weight_map"),
        (lambda index: index["weight_map"].update(x=3), "no weight_map"),
        (lambda index: index.update(metadata=3), "metadata=3"),
        (lambda index: index["weight_map"].update(x="../in/model.safetensors"), "'../in/model.safetensors'"),
        (lambda index: index["weight_map"].update(x="/etc/x.safetensors"), "'/etc/x.safetensors'"),
        (lambda index: index["weight_map"].update(x="a\\b.safetensors"), "no name of a .safetensors file"),
        (lambda index: index["weight_map"].update(x="a\n.safetensors"), "no name of a .safetensors file"),
        (lambda index: index["weight_map"].update(x="config.json"), "'config.json'"),
        (lambda index: index["weight_map"].update(x=".safetensors"), "'.safetensors'"),
        (lambda index: index["weight_map"].update(x="absent.safetensors"), "absent.safetensors, which is not in"),
        (lambda index: index["weight_map"].update(x=min(index["weight_map"].values())), "does not hold it"),
    ],
)
def test_damaged_indexes(change: Change, message: str, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    change(index)
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, rf"(?s){INDEX}.*{message.replace('[', '')}")


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_files_that_are_no_json_objects(content: bytes, name: str, sharded: Path) -> None:
    (sharded / name).write_bytes(content)
    refused(sharded, name)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    both = load_file(first) | load_file(second)
    save_file(both, second)
    refused(sharded, rf"in two files, .*{first.name} and .*{second.name}")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [64, 63]},
        {"shape": [-64, -64]},
        {"shape": [64.0, 64]},
        {"shape": [2**62, 2**62]},
        {"dtype": "F16"},
        {"dtype": "X32"},
        {"data_offsets": [8, 16392]},
        {"data_offsets": [16384, 0]},
    ],
    ids=str,
)
def test_headers_that_contradict_themselves(change: dict[str, Any], tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / SINGLE
    header, data = header_of(path)
    name = min((n for n in header if n.endswith("q_proj.weight")), key=lambda n: header[n]["data_offsets"])
    header[name] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused(tmp_path / "in", SINGLE)


@pytest.mark.parametrize("length", [0, 7, 2**40, 100])
def test_lengths_of_headers_that_are_not_believed(length: int, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(length.to_bytes(8, "little")[: length if length == 7 else 8] + b"{}")
    with pytest.raises(ValueError, match=SINGLE):
        Reader(path)


def test_every_dtype_is_copied_byte_by_byte(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.int8, torch.uint16, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float64]
    given = {str(dtype): (torch.arange(12).view(3, 4) % 2).to(dtype) for dtype in dtypes}
    given |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    save_file(given, tmp_path / "old")
    reader = Reader(tmp_path / "old")
    with Writer(tmp_path / "new", reader.entries, reader.metadata) as writer:
        for name in reader.entries:
            writer.copy(reader, name)
    assert header_of(tmp_path / "new")[1] == header_of(tmp_path / "old")[1]


def test_marker_of_an_interrupted_conversion_that_is_damaged(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion_unfinished.json").write_text("{")
    with pytest.raises(ValueError, match=r"conversion_unfinished\.json"):
        convert_checkpoint(sharded, tmp_path / "out", 2)
