"""A checkpoint in a folder of safetensors: its config, its shards, and where in them the projections are.

The skeleton of the model, on the meta device, says which projections there are and what `save_pretrained`
calls their tensors. What cannot be converted from its files is refused here, before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_attnkit.conversion.checkpoints.likeness import Likeness, SmallModel
from hf_attnkit.conversion.checkpoints.safetensors_stream import DTYPES, Entry, Reader
from hf_attnkit.editing.heads_before import says_heads_before
from hf_attnkit.loading import skeleton
from hf_attnkit.models.whole import configs_in

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MARKER = "conversion_unfinished.json"  # in a folder that a conversion has not completed
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json",
           ".partial")  # fmt: skip


def carried(folder: Path) -> list[Path]:
    """The files of a checkpoint that are neither its config nor weights: they are copied as they are."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in (CONFIG, MARKER) and not path.name.endswith(WEIGHTS)
    ]


class Checkpoint:
    """A folder's shards and the projections in them.

    Attributes:
        shards: file name -> reader.
        carried: the other files, which a conversion copies.
        index: the content of the index, `None` for a single file.
        model: the skeleton.
        small: a small model of the same class, which tells where heads lie.
        layers: the skeleton's attention layers.
        saved: by the names that the model gives them, what the tensors of its attention are called in the files.

    Raises:
        ValueError: for a checkpoint that is incomplete, damaged, quantized, swapped, in another format or layout,
            or whose heads cannot be told.
        FileNotFoundError: if there is no config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _config(folder)
        self.index, names = _files(folder)
        self.carried = carried(folder)
        for path in (*(folder / name for name in names), *self.carried):
            require_inside(folder, path)
        self.shards = {name: Reader(folder / name) for name in names}
        self._readers: dict[str, Reader] = {}
        for reader in self.shards.values():
            for tensor in reader.entries:
                if tensor in self._readers:
                    raise ValueError(f"{tensor!r} is in two files, {self._readers[tensor].path} and {reader.path}")
                self._readers[tensor] = reader
        if self.index is not None:
            for tensor, name in self.index["weight_map"].items():
                if tensor not in self.shards[name].entries:
                    raise ValueError(f"{folder / INDEX} lists {tensor!r} in {name}, which does not hold it")
        self.model: PreTrainedModel = skeleton(config)
        self.small = SmallModel(self.model)
        self.layers = [one.layer for one in self.small.likenesses]
        self.saved = self._owned_names(self.small.likenesses)

    @property
    def key_dtype(self) -> torch.dtype:
        """In which the attentions are stored."""
        return DTYPES[self.entry(next(iter(self.saved.values()))).dtype]

    def entry(self, tensor: str) -> Entry:
        """What its shard says about a tensor."""
        return self.reader(tensor).entries[tensor]

    def reader(self, tensor: str) -> Reader:
        """The shard that holds a tensor."""
        return self._readers[tensor]

    def rows(self, tensor: str, rows: slice = slice(None)) -> Tensor:
        """These rows of a tensor."""
        return self.reader(tensor).rows(tensor, rows)

    def _owned_names(self, likenesses: Sequence[Likeness]) -> dict[str, str]:
        """By parameter of the attentions and their output projections, its name in the files."""
        names: dict[str, Tensor] = {}
        for one in likenesses:
            if one.mate.calls_per_forward > 1 or one.owned.problem:
                why = one.owned.problem or "it attends several times in one forward pass"
                raise ValueError(f"{one.path}: heads cannot be merged: {why}")
            for path in (one.path, *([] if one.output is None else [one.output])):
                module = self.model.get_submodule(path)
                names |= {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
        users: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            users.setdefault(id(parameter), []).append(name)
        for name, parameter in names.items():
            if len(users[id(parameter)]) > 1:
                raise ValueError(f"{name} is one parameter with {users[id(parameter)]}; give each its own copy first")
        saved = _saved_as(self.model, names)
        return {name: self._find(parameter, saved, name, "a parameter") for name, parameter in names.items()}

    def _find(self, parameter: Tensor, saved: dict[int, str], owner: str, what: str) -> str:
        name, prefix = saved[id(parameter)], f"{self.model.base_model_prefix}."
        # Transformers loads a base model into a model with a head and the other way round.
        found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in self._readers), None)
        if found is None:
            raise ValueError(
                f"{owner}: the checkpoint in {self.folder} has no tensor {name!r} ({what} of "
                f"{type(self.model).__name__}); if it is in an older layout, load it with hf_attnkit.load_pretrained "
                "and save it with save_pretrained"
            )
        entry = self.entry(found)
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{found!r} is {entry.dtype}: the checkpoint is quantized; convert the checkpoint that it was made "
                "from, and quantize the result"
            )
        if entry.shape != tuple(parameter.shape):
            raise ValueError(
                f"{found!r} has the shape {entry.shape}, but the config asks for {tuple(parameter.shape)}; correct the "
                "config's numbers of heads"
            )
        return found


def _config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint that can be converted."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; give the folder of a checkpoint")
    require_inside(folder, folder / CONFIG)
    read_json(folder / CONFIG)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the checkpoint in {folder} is quantized; convert the one that it was made from, and quantize the result"
        )
    recorded = says_heads_before(config)
    for each in configs_in(config):
        said = getattr(each, "hf_attnkit", None) or {}
        if "layers" in said:
            raise ValueError(
                f"the attention of the checkpoint in {folder} was swapped; load it with hf_attnkit.load_pretrained, "
                "call restore_attention or convert_to_gqa, and save it"
            )
        if recorded or said.get("heads"):
            raise ValueError(
                f"the config of the checkpoint in {folder} records other numbers of heads than its class has; load it "
                "with hf_attnkit.load_pretrained, call convert_to_gqa and save it"
            )
    if not config.architectures:
        raise ValueError(f'{folder / CONFIG} names no class; add it, for example "architectures": ["LlamaForCausalLM"]')
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds PEFT adapters; merge them first: model = model.merge_and_unload()")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: with the file's name, if there is none in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds a {type(found).__name__}; get it again")
    return found


def require_inside(folder: Path, path: Path) -> None:
    """Raise `ValueError` if a file of the folder is a link to something outside it.

    Files of the hub's cache are links from `snapshots/<revision>` to `blobs` of the same repository, and are read.
    """
    real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{path} is a link to {real}, outside the checkpoint's folder, and would be read or copied from there; "
            "replace it by the file itself, or remove it"
        )


def _files(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index, if there is one, and the names of the shards; one file goes before an index, as in Transformers."""
    if (folder / SINGLE).is_file():
        return None, [SINGLE]
    if (folder / INDEX).is_file():
        require_inside(folder, folder / INDEX)
        index = read_json(folder / INDEX)
        places, about = index.get("weight_map"), index.get("metadata")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map of tensors' names to files' names; get it again")
        if not isinstance(about, dict | None):
            raise ValueError(f"{folder / INDEX}: metadata={about!r} must be an object; get it again")
        names = sorted(set(places.values()))
        for name in names:
            odd = Path(name).name != name or "\\" in name or not name.isprintable()
            if odd or name.startswith(".") or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{folder / INDEX} lists {name!r}, which is no name of a .safetensors file in the folder"
                )
            if not (folder / name).is_file():
                raise ValueError(f"{folder / INDEX} lists {name}, which is not in the folder")
        return index, names
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS))
    remedy = "load the model with hf_attnkit.load_pretrained (GGUF: gguf_file=...) and save it with save_pretrained"
    given = f"weights in another format ({', '.join(others[:3])}): {remedy}" if others else "no weights"
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}, but {given}")


def _saved_as(model: PreTrainedModel, wanted: Mapping[str, Tensor]) -> dict[int, str]:
    """By a parameter's id, its name in what `save_pretrained` writes.

    Raises:
        ValueError: if one of these is saved in another form.
    """
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(wanted)).items()}
    if saved.keys() != {id(tensor) for tensor in wanted.values()}:
        raise ValueError(
            f"{type(model).__name__} saves attention projections in other tensors than it runs them; load it with "
            "hf_attnkit.load_pretrained, call convert_to_gqa and save it"
        )
    return saved
