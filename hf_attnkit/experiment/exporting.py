"""Export a task's model and measure the file: the same rows, the same metric code, the time next to PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_attnkit.experiment.arguments import require_place
from hf_attnkit.experiment.benchmarking.measure import quartiles, time_alternately
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.glue.run import GlueRun
from hf_attnkit.experiment.record import Change
from hf_attnkit.experiment.report.card import write_card
from hf_attnkit.experiment.report.console import print_stages
from hf_attnkit.experiment.report.page import write_report
from hf_attnkit.experiment.report.stage_table import model_name
from hf_attnkit.experiment.timing import REPEATS, longest_batch, spread
from hf_attnkit.export import PRECISIONS, Exported, export_onnx
from hf_attnkit.export.loads_where import loads_where


@dataclass
class ExportArguments:
    """How a model is exported."""

    precision: str = field(
        default="float32",
        metadata={
            "help": "Of the file: float32, float16, or int8 (weights of 8 bits, activations quantized as they come).",
            "choices": list(PRECISIONS),
        },
    )
    int8_skip_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "With int8: modules of which the products stay in float32, such as '*[0-9].output.dense'."},
    )
    opset: int | None = field(default=None, metadata={"help": "Of ONNX; by default the exporter's."})
    compare_with: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of the untouched model; measured and timed, too."},
    )

    def __post_init__(self) -> None:
        if self.compare_with is not None:
            require_place(self.compare_with)


class OnnxClassifier(nn.Module):
    """An exported classifier in the place of its model, so that `Trainer` measures it."""

    def __init__(self, exported: Any, is_regression: bool) -> None:
        """
        Args:
            exported: what `ExportedModel.from_pretrained` returns.
        """
        super().__init__()
        self.exported, self._is_regression = exported, is_regression
        self._names = list(exported.components["model"].metadata.kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits `(batch, classes)`, and the task's loss where there are labels."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        logits = self.exported(**{name: given[name] for name in self._names}).logits.float()
        if labels is None:
            return {"logits": logits}
        if self._is_regression:
            return {"loss": F.mse_loss(logits.squeeze(-1), labels.float()), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def export_and_measure(run: GlueRun, arguments: ExportArguments) -> Exported:
    """Export `run.model` into the run's folder, measure it next to the model, and write results, card and report.

    Raises:
        ImportError, ValueError, OSError: as `export_onnx`; on a machine with a GPU without `--use_cpu`.
    """
    from transformers.exporters import ExportedModel

    if run.training.device.type != "cpu":
        raise ValueError(
            f"an export is compared and timed on a CPU, and this run is on {run.training.device}: --use_cpu"
        )
    model = run.model.eval()
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("precision", "int8_skip_modules", "opset")}
    exported = export_onnx(model, run.output, tokenizer=run.tokenizer, **options)
    sides: dict[str, nn.Module] = {"baseline": model}
    if arguments.compare_with is not None:
        sides = {"baseline": run.load_model(arguments.compare_with).eval(), "changed": model}
    for stage, one in sides.items():
        run.model = one
        run.evaluate(stage, file_bytes=sum(parameter.nbytes for parameter in one.parameters()))
    options = session_options(torch.get_num_threads())
    file = ExportedModel.from_pretrained(run.output, local_files_only=True, device="cpu", session_options=options)
    sides["exported"] = OnnxClassifier(file, run.task.is_regression)
    trainer = run.trainer(model=sides["exported"])
    run.stages.append({**run.stages[-1], **run.measure(trainer), "stage": "exported", "file_bytes": exported.num_bytes})
    run.done = Change("export", f"exported to ONNX, {arguments.precision}", _facts(exported))
    found = run.results(**{name: value for name, value in vars(arguments).items() if name != "precision"})
    found["timing"] = _timing(sides, longest_batch(trainer, run.eval_data), found["device"])
    found["loads"] = [vars(answer) for answer in loads_where(run.output)]
    write_card(run.output, found, name=model_name(str(run.output.resolve())))
    write_json(run.output / "results.json", found)
    run.progress.remove()
    write_report(run.output)
    print_stages(found)
    return exported


def session_options(threads: int) -> Any:
    """ONNX Runtime's options for so many threads, which sleep while they wait."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _timing(sides: Mapping[str, nn.Module], batch: Mapping[str, Tensor], device: str) -> dict[str, Any]:
    """What results.json holds as "timing": each side's forward pass, all alternately."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                model(**inputs)

        return run

    seconds = time_alternately({name: forward(one) for name, one in sides.items()}, REPEATS, torch.device("cpu"))
    milliseconds = 1e3 * quartiles(seconds["baseline"])[1]
    ratios = {
        name: [one / base for one, base in zip(times, seconds["baseline"], strict=True)]
        for name, times in seconds.items()
    }
    rows, tokens = inputs["input_ids"].shape
    return {
        "batch_size": rows,
        "sequence_length": tokens,
        "repeats": REPEATS,
        "device": device,
        "stages": [{"stage": name, **spread(each, milliseconds)} for name, each in ratios.items()],
    }


def _facts(exported: Exported) -> dict[str, Any]:
    lengths, batches = ({getattr(one, name) for one in exported.compared} for name in ("length", "batch"))
    return {
        "format": "ONNX",
        "precision": exported.precision,
        "inputs": list(exported.inputs),
        "compared at batches of": sorted(batches),
        "compared at lengths of": sorted(lengths),
        "off by at most": f"{exported.off:.1e} of the largest output",
    }
