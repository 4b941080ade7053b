"""A checkpoint in a folder of safetensors: its config, its shards, and where in them the projections are.

The skeleton of the model, on the meta device, says which projections there are and what `save_pretrained`
calls their tensors. What cannot be converted from its files is refused here, before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_attnkit.conversion.checkpoints.safetensors_stream import DTYPES, Entry, Reader
from hf_attnkit.editing.change import require_unshared
from hf_attnkit.loading import skeleton
from hf_attnkit.models.layers import AttentionLayer, editable_layers

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json",
           ".partial")  # fmt: skip
PROJECTIONS = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Place:
    """A projection in a checkpoint: names of its tensors, and its rows in them."""

    weight: str
    bias: str | None
    rows: slice

    @property
    def tensors(self) -> list[str]:
        """The names that there are."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class Checkpoint:
    """A folder's shards and the projections in them.

    Attributes:
        shards: file name -> reader.
        index: the content of the index, `None` for a single file.
        model: the skeleton.
        layers: the skeleton's attention layers.
        places: per layer, projection -> place.

    Raises:
        ValueError: for a checkpoint that is incomplete, damaged, quantized, swapped, in another format or layout,
            or of a family whose heads are fixed.
        FileNotFoundError: if there is no config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _config(folder)
        self.index, names = _files(folder)
        self.shards = {name: Reader(folder / name) for name in names}
        self._readers = {tensor: reader for reader in self.shards.values() for tensor in reader.entries}
        if self.index is not None:
            for tensor, name in self.index["weight_map"].items():
                if tensor not in self.shards[name].entries:
                    raise ValueError(f"{folder / INDEX} lists {tensor!r} in {name}, which does not hold it")
        self.model: PreTrainedModel = skeleton(config)
        self.layers = editable_layers(self.model, skeleton=True)
        require_unshared(self.model, self.layers)
        saved = _saved_names(self.model, self.layers)
        self.places = [self._places(layer, saved) for layer in self.layers]

    def entry(self, tensor: str) -> Entry:
        """What its shard says about a tensor."""
        return self.reader(tensor).entries[tensor]

    def reader(self, tensor: str) -> Reader:
        """The shard that holds a tensor."""
        return self._readers[tensor]

    def rows(self, tensor: str, rows: slice = slice(None)) -> Tensor:
        """These rows of a tensor."""
        return self.reader(tensor).rows(tensor, rows)

    def _places(self, layer: AttentionLayer, saved: dict[int, str]) -> dict[str, Place]:
        found = {}
        for name in PROJECTIONS:
            linear: nn.Linear = getattr(layer, name)
            weight = self._find(linear.weight, saved, layer, name)
            bias = None if linear.bias is None else self._find(linear.bias, saved, layer, name)
            found[name] = Place(weight, bias, layer.rows(name))
        return found

    def _find(self, parameter: Tensor, saved: dict[int, str], layer: AttentionLayer, projection: str) -> str:
        name, prefix = saved[id(parameter)], f"{self.model.base_model_prefix}."
        # Transformers loads a base model into a model with a head and the other way round.
        found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in self._readers), None)
        if found is None:
            raise ValueError(
                f"{layer.name}: the checkpoint in {self.folder} has no tensor {name!r} (the {projection} projection of "
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
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the checkpoint in {folder} is quantized; convert the one that it was made from, and quantize the result"
        )
    if getattr(config, "hf_attnkit", None) is not None:
        raise ValueError(
            f"the attention of the checkpoint in {folder} was swapped; load it with hf_attnkit.load_pretrained, call "
            "restore_attention or convert_to_gqa, and save it"
        )
    if not config.architectures:
        raise ValueError(f'{folder / CONFIG} names no class; add it, for example "architectures": ["LlamaForCausalLM"]')
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds PEFT adapters; merge them first: model = model.merge_and_unload()")
    return config


def _files(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index, if there is one, and the names of the shards; one file goes before an index, as in Transformers."""
    if (folder / SINGLE).is_file():
        return None, [SINGLE]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        names = sorted(set(index["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        outside = [name for name in names if Path(name).name != name]
        if absent or outside:
            raise ValueError(f"{folder / INDEX} lists {(absent or outside)[0]}, which is not in the folder")
        return index, names
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS))
    remedy = "load the model with hf_attnkit.load_pretrained (GGUF: gguf_file=...) and save it with save_pretrained"
    given = f"weights in another format ({', '.join(others[:3])}): {remedy}" if others else "no weights"
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}, but {given}")


def _saved_names(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> dict[int, str]:
    """What `save_pretrained` calls the projections' parameters, by their id: some classes save under older names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = {}
    for layer in layers:
        for projection in PROJECTIONS:
            for parameter in getattr(layer, projection).parameters():
                wanted[names[id(parameter)]] = parameter
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(wanted)).items()}
    if saved.keys() != {id(tensor) for tensor in wanted.values()}:
        raise ValueError(
            f"{type(model).__name__} saves attention projections in other tensors than it runs them; load it with "
            "hf_attnkit.load_pretrained, call convert_to_gqa and save it"
        )
    return saved
