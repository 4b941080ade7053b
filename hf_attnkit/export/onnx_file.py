"""`export_onnx`: a model as an ONNX file, made by Transformers' exporter and compared with the model.

prepare     what cannot be exported is refused before anything is written
trace       `transformers.exporters`, with batch and length left open; swapped layers compute their kind as one
            expression of any length, see `attention.any_length`
save        into a folder next to the target
compare     ONNX Runtime on the saved file against PyTorch, on lengths, batches and padding that were not traced
finish      the folder gets its name
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_attnkit.attention.any_length import any_length
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.common.checks import choice, integer
from hf_attnkit.common.state import evaluation_mode, plain_mode
from hf_attnkit.export import generation, inputs
from hf_attnkit.export.folder import finished_or_absent
from hf_attnkit.export.int8 import quantized
from hf_attnkit.export.packages import require_packages
from hf_attnkit.export.proof import Compared, compare, first_line

PRECISIONS = ("float32", "float16", "int8")
LOWEST_OPSET = 18
_LOUD = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir", "transformers", "root")


@dataclass(frozen=True)
class Exported:
    """What was written and how it was compared.

    Attributes:
        folder: holds model.onnx, its weights, config and tokenizer.
        precision: of the weights, one of `PRECISIONS`.
        inputs: names of the graph's inputs, caches left out.
        decodes: whether it takes and returns a cache of keys and values.
        compared: the comparisons that it passed.
        num_bytes: of model.onnx and its weights.
    """

    folder: Path
    precision: str
    inputs: tuple[str, ...]
    decodes: bool
    compared: tuple[Compared, ...]
    num_bytes: int

    @property
    def off(self) -> float:
        """The largest difference, as a fraction of the largest output."""
        return max(one.off for one in self.compared)

    def __str__(self) -> str:
        lengths = sorted({one.length for one in self.compared})
        batches = sorted({one.batch for one in self.compared})
        checked = (
            f"batches of {_listed(batches)}, lengths of {_listed(lengths)} tokens, padded rows: "
            f"off by at most {self.off:.1e} of the largest output"
        )
        explained = "weights of 8 bits" if self.precision == "int8" else f"rounding explains {self.bound:.1e}"
        steps = ", and token by token with a cache" if self.decodes else ""
        return (
            f"{self.folder / 'model.onnx'}, {self.precision}, {self.num_bytes / 2**20:.1f} MiB\n"
            f"compared with the model in ONNX Runtime{steps}: {checked} ({explained})"
        )

    @property
    def bound(self) -> float:
        """What rounding explains, likewise: the smallest bound of all comparisons."""
        return min(one.bound for one in self.compared)


def export_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    precision: str = "float32",
    int8_skip_modules: Sequence[str] = (),
    opset: int | None = None,
) -> Exported:
    """Write a model that reads text as an ONNX file, compared with it in ONNX Runtime before it gets its name.

    A model that generates takes and returns a cache: one graph for the prompt and for each step. The model stays as
    it is.

    Args:
        model: in float32 on a CPU, stock or changed: any heads per layer, any kind of attention.
        folder: is made; must not exist, or be empty.
        tokenizer: saved with it; its `model_input_names` say whether the graph takes `token_type_ids`.
        precision: "float32", "float16" (weights and sums), or "int8" (ONNX Runtime's dynamic quantization: weights of
            8 bits, activations quantized as they come).
        int8_skip_modules: patterns of module paths, as `fnmatch` reads them, whose products stay in float32 under
            "int8": "*[0-9].output.dense" are those of BERT that lose most, see docs/serving.md.
        opset: of ONNX; by default that of the exporter.

    Raises:
        ImportError: without the packages of `hf_attnkit[export]`.
        ValueError: for what cannot be exported right; the message says why, and nothing is left behind.
        OSError: if it cannot be written; nothing is left behind.
    """
    require_packages()
    _check(model)
    choice(precision, "precision", PRECISIONS)
    if isinstance(int8_skip_modules, str) or not all(isinstance(each, str) for each in int8_skip_modules):
        raise ValueError(f"int8_skip_modules={int8_skip_modules!r} must be a list of patterns of module paths")
    if int8_skip_modules and precision != "int8":
        raise ValueError(f"int8_skip_modules has no effect with precision={precision!r}; leave it out")
    if opset is not None:
        import onnx

        newest = onnx.defs.onnx_opset_version()
        opset = integer(opset, "opset", minimum=LOWEST_OPSET, maximum=newest, why="what the exporter and onnx know")
    known = None if tokenizer is None else list(tokenizer.model_input_names)
    names = inputs.input_names(model, known)
    decodes = bool(model.can_generate())
    with finished_or_absent(Path(folder)) as place:
        found = _write(model, place, tokenizer, names, decodes, precision, int8_skip_modules, opset)
    size = sum(path.stat().st_size for path in Path(folder).glob("model.onnx*"))
    return Exported(Path(folder), precision, tuple(names), decodes, tuple(found), size)


def _check(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}; merge adapters first")
    name = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name} has parameters on the meta device, without values; load its weights first")
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(f"{name} has quantized weights; load it without, and export with precision='int8'")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} has adapters, which no file of the whole holds; merge them first (merge_and_unload)")
    devices = {parameter.device.type for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if devices != {"cpu"} or dtypes != {torch.float32}:
        found = ", ".join(sorted({str(each).removeprefix("torch.") for each in devices | dtypes}))
        raise ValueError(
            f"{name} is in {found}, and an export is traced and compared in float32 on a CPU: "
            "model.to('cpu', torch.float32), and precision='float16' or 'int8' for a smaller file"
        )
    for module in model.modules():
        kind = getattr(module, ATTRIBUTE, None)
        if getattr(kind, "cache_dtype", None) is not None:
            raise ValueError(
                f"{name} runs {kind}, and the cache of a file is in the file's own precision: swap with "
                "cache_dtype=None first"
            )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder and a decoder, two graphs, which this export does not make")
    if model.main_input_name != "input_ids" or not isinstance(
        getattr(model.config.get_text_config(), "vocab_size", None), int
    ):
        raise ValueError(f"{name} reads {model.main_input_name!r}; only models that read text (input_ids) are exported")


def _write(
    model: PreTrainedModel,
    place: Path,
    tokenizer: Any,
    names: list[str],
    decodes: bool,
    precision: str,
    skip_modules: Sequence[str],
    opset: int | None,
) -> list[Compared]:
    """Export into `place` and compare."""
    from transformers.exporters import ExportedModel

    traced = copy.deepcopy(model).half() if precision == "float16" else model
    try:
        with (
            _silence(),
            plain_mode(),
            evaluation_mode(traced),
            _attributes_kept(traced),
            any_length(traced),
            torch.no_grad(),
        ):
            if decodes:
                exported = generation.export_decoder(traced, opset)
            else:
                exported = _export_encoder(traced, inputs.traced_inputs(model, names), opset)
    except Exception as error:  # of the classes of torch.export, torch.onnx, ONNX and this package
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{type(model).__name__} cannot be exported: {first_line(error)}") from error
    dtype = {"float32": torch.float32, "float16": torch.float16, "int8": None}[precision]

    def check(dtype: torch.dtype | None) -> list[Compared]:
        with _silence():
            exported.save_pretrained(place)
            saved = ExportedModel.from_pretrained(place, local_files_only=True, device="cpu")
            if decodes:
                return generation.compare_decoder(model, saved, dtype)
            return compare(model, saved, list(inputs.compared_inputs(model, names)), dtype)

    found = check(dtype or torch.float32)
    if precision == "int8":
        component = exported.components["model"]
        with _silence():
            component.program = quantized(component.program, inputs.traced_inputs(model, names), skip_modules)
        found = check(None)
    model.config.save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    return found


def _export_encoder(model: PreTrainedModel, traced: dict[str, torch.Tensor], opset: int | None) -> Any:
    from transformers.exporters import OnnxConfig, OnnxExporter

    # Not AUTO, which would fix a size silently where the model's code needs it fixed.
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in traced}
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset)
    without_cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return OnnxExporter().export(model, {**traced, **without_cache}, config)


@contextmanager
def _attributes_kept(model: PreTrainedModel) -> Iterator[None]:
    """Take away what the exporter leaves on the model: it puts `forward` back as an attribute of the object."""
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            del vars(model)[name]


@contextmanager
def _silence() -> Iterator[None]:
    """The exporters print and log at length; what matters of it comes as an error."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
