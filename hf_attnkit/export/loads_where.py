"""What loads and runs a saved model: tried where that can be tried here, else by a rule that names its source.

| where | how it is decided |
| --- | --- |
| `from_pretrained` of Transformers | tried: its class, built from config.json alone, has the saved sizes |
| `load_pretrained` | tried: the sizes that it builds are those of the safetensors |
| ONNX file | there and compared; else what `export_onnx` refuses |
| pipelines | tried on the model in memory |
| `generate_batch` | rule: its paged cache takes one number of heads, see `attention.paged` |
| PEFT | tried: LoRA on every linear layer of an empty model of this config |
| GGUF, vLLM | rule: they build classes of their own from the config's fields |
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.paged import reason_against
from hf_attnkit.attention.saved_kinds import is_saved
from hf_attnkit.export.proof import first_line
from hf_attnkit.loading import skeleton

YES, NO, NOT_TRIED = "yes", "no", "not tried"
ONNX = "model.onnx"
_GGUF = "llama.cpp's convert_hf_to_gguf.py"
_VLLM = "docs.vllm.ai, Supported Models"


@dataclass(frozen=True)
class Answer:
    """One row.

    Attributes:
        where: what would load or run it.
        verdict: "yes", "no" or "not tried".
        why: what was tried, or the rule and its source.
    """

    where: str
    verdict: str
    why: str


def loads_where(folder: str | Path, model: PreTrainedModel | None = None, tokenizer: Any = None) -> list[Answer]:
    """What loads the model that is saved in a folder, and what runs it.

    Args:
        folder: holds config.json, and the weights or an ONNX file. One that holds adapters alone has no answers.
        model: the same in memory; without it pipelines are not tried.
        tokenizer: its tokenizer.

    Raises:
        OSError, ValueError: if the folder holds no config of a model.
    """
    place = Path(folder)
    if not (place / "config.json").is_file() and (place / "adapter_config.json").is_file():
        return []
    config = AutoConfig.from_pretrained(place)
    if (place / ONNX).is_file():
        return _of_an_export()
    empty = skeleton(config)
    plain, generates = loads_without_us(place), bool(empty.can_generate())
    sizes = "the saved sizes" if plain else "other sizes or attention"
    rows = [
        Answer(
            "Transformers, from_pretrained",
            YES if plain else NO,
            f"tried: its class, built from config.json alone, has {sizes}",
        ),
        _ours(place, empty),
        _onnx(empty),
        _pipeline("text-classification", model, tokenizer, "SequenceClassification", empty),
        _pipeline("text-generation", model, tokenizer, "CausalLM", empty),
        _batching(empty if model is None else model, config, generates),
        _peft(empty),
    ]
    for where, source in (("GGUF", _GGUF), ("vLLM", _VLLM)):
        rule = f"rule: it builds classes of its own from the config's fields ({source})"
        why = f"an ordinary checkpoint of {config.architectures[0]}; {rule}" if plain else rule
        rows.append(Answer(where, NOT_TRIED if plain else NO, why))
    return rows


def loads_without_us(folder: Path) -> bool:
    """Whether Transformers' own class, built from the saved config, has the saved model's sizes and attention."""
    config = AutoConfig.from_pretrained(folder)
    said = getattr(config, "hf_attnkit", None) or {}
    if "layers" in said or said.get("heads"):
        return False
    sizes = _sizes(skeleton(config))
    try:
        with torch.device("meta"):
            stock = getattr(transformers, config.architectures[0])(AutoConfig.from_pretrained(folder))
    except Exception:  # each class has errors of its own for numbers of heads that it cannot express
        return False
    return _sizes(stock) == sizes


def _sizes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _of_an_export() -> list[Answer]:
    needed = "the folder holds an ONNX file, and no weights of PyTorch"
    return [
        Answer("ONNX file", YES, "compared with the model in ONNX Runtime before it got its name"),
        Answer("Transformers, ExportedModel.from_pretrained", YES, "it read the file for that comparison"),
        *(
            Answer(where, NO, needed)
            for where in ("Transformers, from_pretrained", "load_pretrained", "pipelines", "generate_batch",
                          "PEFT on top", "GGUF", "vLLM")
        ),
    ]  # fmt: skip


def _ours(folder: Path, empty: PreTrainedModel) -> Answer:
    where, stored = "load_pretrained", dict[str, tuple[int, ...]]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            stored |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    if not stored:
        return Answer(where, NOT_TRIED, "the folder has no safetensors")
    wanted = {name: tuple(size) for name, size in _sizes(empty).items()}
    wrong = [name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]]
    recorded = getattr(empty.config, "hf_attnkit", None) or {}
    if wrong and "heads" not in recorded:  # recorded ones get their shapes from the weights
        return Answer(where, NO, f"tried: {wrong[0]} has {stored[wrong[0]]} and the config asks for {wanted[wrong[0]]}")
    return Answer(where, YES, "tried: it builds the saved sizes")


def _onnx(empty: PreTrainedModel) -> Answer:
    where = "ONNX file"
    if getattr(empty.config, "is_encoder_decoder", False) or empty.main_input_name != "input_ids":
        return Answer(where, NO, "export_onnx takes models of one graph that read text")
    swapped = (getattr(empty.config, "hf_attnkit", None) or {}).get("layers", {})
    if any(options.get("num_random_blocks") for _, options, *_ in swapped.values()):
        return Answer(where, NO, "export_onnx refuses random blocks, which are drawn in Python for each length")
    return Answer(where, NOT_TRIED, "hf-attnkit export makes it, and compares it before it gets its name")


def _pipeline(task: str, model: PreTrainedModel | None, tokenizer: Any, head: str, empty: PreTrainedModel) -> Answer:
    where = f"pipeline {task}"
    name = type(empty).__name__
    if head not in name and not (head == "CausalLM" and empty.can_generate()):
        return Answer(where, NO, f"{name} is made for another task")
    if model is None or tokenizer is None:
        return Answer(
            where, NOT_TRIED, "pipeline(task, model=load_pretrained(folder), tokenizer=folder) takes the model"
        )
    options = {"max_new_tokens": 2, "do_sample": False} if task == "text-generation" else {}
    was_training = model.training
    try:
        with _quiet():
            made = transformers.pipeline(task, model=model, tokenizer=copy.deepcopy(tokenizer), device=model.device)
            answer = made("a", **options)
    except Exception as error:  # of any part of Transformers
        return Answer(where, NO, f"tried: {first_line(error)}")
    finally:
        model.train(was_training)
    return Answer(where, YES if answer else NO, "tried with the model that load_pretrained returns")


def _batching(empty: PreTrainedModel, config: PreTrainedConfig, generates: bool) -> Answer:
    where = "continuous batching, generate_batch"
    if not generates:
        return Answer(where, NO, f"{type(empty).__name__} does not generate")
    if is_saved(config):
        return Answer(where, NO, "Transformers refuses attention that it does not have itself")
    recorded = (getattr(config, "hf_attnkit", None) or {}).get("heads", {})
    if len({tuple(numbers) for numbers in recorded.values()}) > 1:
        return Answer(
            where, NO, "it raises: its layers have different numbers of heads, and its cache takes one for all"
        )
    if (reason := reason_against(empty)) is not None:
        return Answer(where, NO, f"it raises: {reason.partition(';')[0]}")
    return Answer(where, YES, "rule: one number of heads, which the config says, and Transformers' own attention")


def _peft(empty: PreTrainedModel) -> Answer:
    where = "PEFT on top"
    try:
        from peft import LoraConfig, get_peft_model

        with _quiet(), torch.device("meta"):
            get_peft_model(copy.deepcopy(empty), LoraConfig(r=1, target_modules="all-linear"))
    except ImportError:
        return Answer(where, NOT_TRIED, "PEFT is not installed")
    except Exception as error:  # of PEFT's own
        return Answer(where, NO, f"tried: {first_line(error)}")
    return Answer(where, YES, "tried: LoRA on every linear layer of the model that load_pretrained builds")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
