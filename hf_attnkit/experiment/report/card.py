"""The model card (Mitchell et al. 2019, arXiv 1810.03993) of a recipe's model, with the metadata that the hub reads.

    python -m hf_attnkit.experiment.report.card OUTPUT_DIR

writes README.md again, from the folder's results.json and config.json alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_attnkit import available_attentions
from hf_attnkit.experiment.files import write_text
from hf_attnkit.experiment.report import summary
from hf_attnkit.experiment.report.results import public, read_results, without_folders
from hf_attnkit.experiment.report.schema import Data, Results
from hf_attnkit.experiment.report.stage_table import heads, model_name, notes, stage_table
from hf_attnkit.experiment.report.template import environment
from hf_attnkit.export.loads_where import ONNX, loads_where, loads_without_us

ADAPTERS = "adapter_config.json"  # of a folder that holds adapters and no model
# A task's metric -> the hub's name for it, where they differ.
_HUB_METRICS = {"pearson": "pearsonr"}
# Kinds of change -> tags that people search for; another kind is its own tag.
_TAGS = {
    "pruning": ["head-pruning"], "conversion": ["grouped-query-attention"], "swap": ["attention-swap"],
    "adapters": ["lora"], "fine-tuning": [], "export": ["onnx"], "linearization": ["linear-attention"],
}  # fmt: skip
_AUTO_CLASSES = {"text-generation": "ModelForCausalLM", "text-classification": "ModelForSequenceClassification"}


def write_card(folder: Path, results: Mapping[str, Any], name: str) -> None:
    """Write README.md next to a saved model.

    Args:
        folder: holds the model.
        results: what results.json holds.
        name: of the model: its repository on the hub, or its folder.

    Raises:
        ValueError: as `read_results`.
    """
    found, name = public(results), without_folders(name)
    card = ModelCard(f"---\n{_metadata(folder, found, name).to_yaml()}\n---\n\n{_text(folder, found, name)}")
    write_text(folder / "README.md", str(card))


def base_model(path: str) -> str | None:
    """The hub's name of the model that a checkpoint began as: a folder's own card says so, if it has one."""
    if not Path(path).is_dir():
        return path
    card = Path(path) / "README.md"
    if not card.is_file():
        return None
    named = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) else None


def _metadata(folder: Path, results: Results, name: str) -> ModelCardData:
    data, model = results["data"], results["model"]
    of_model = [stage for number, stage in enumerate(results["stages"]) if number != results["control"]]
    metrics = of_model[-1]["metrics"] if of_model else {}
    evaluated = [_result(data, metric, value) for metric, value in metrics.items() if math.isfinite(value)]
    return ModelCardData(
        library_name="peft"
        if (folder / ADAPTERS).is_file()
        else "onnx"
        if (folder / ONNX).is_file()
        else "transformers",
        base_model=model["path"] if model["path"] != "local" else model.get("base_model"),
        datasets=[data["hub_path"]] if _is_on_hub(data) else None,
        language=data["language"],
        metrics=list(dict.fromkeys(result.metric_type for result in evaluated)) or None,
        pipeline_tag=data["task_type"],
        tags=_tags(results),
        model_name=name,
        eval_results=evaluated or None,
    )


def _is_on_hub(data: Data) -> bool:
    return data["hub_path"] not in ("local", "demo")


def _tags(results: Results) -> list[str]:
    change, tags = results["change"], ["hf_attnkit"]
    if change is not None:
        tags += _TAGS.get(change["kind"], [change["kind"]])
        kinds = change["facts"].get("attention", []) if change["kind"] in ("swap", "linearization") else []
        tags += [kind for kind in dict.fromkeys(kinds) if kind in available_attentions()]
    if results["actions"]["trained"]:
        tags += [tag for name, tag in (("lora", "lora"), ("distill", "distillation")) if summary.flag(results, name)]
        tags.append("generated_from_trainer")
    return list(dict.fromkeys(tags))


def _result(data: Data, metric: str, value: float) -> EvalResult:
    """One number of the model. Of several splits each metric's name ends in what its split's name ends in."""
    plain, split = metric, data["splits"]["evaluation"] or ""
    for one in (name.strip() for name in split.split(",")):
        ending = re.sub(r"\[.*", "", one).removeprefix("validation")
        if ending and metric.endswith(ending):
            plain, split = metric.removesuffix(ending), one
    name = (
        f"{'GLUE ' if data['is_benchmark'] else ''}{data['name']}{', not GLUE' if data['hub_path'] == 'demo' else ''}"
    )
    return EvalResult(
        task_type=data["task_type"],
        dataset_type=data["hub_path"] if _is_on_hub(data) else data["name"],
        dataset_name=f"{name} ({data['note']})" if data["note"] else name,
        dataset_config=data["config"],
        dataset_split=split or None,
        metric_type=_HUB_METRICS.get(plain, plain),
        metric_name=metric,
        metric_value=value,
    )


def _text(folder: Path, results: Results, name: str) -> str:
    header, rows = stage_table(results["stages"], results["timing"], results["control"])
    needs, code = _loading(folder, results["data"]["task_type"], json.dumps(name))  # a string as Python reads it
    return environment(markdown=True).get_template("card.md").render(
        title=summary.title(results),
        happened=summary.happened(results),
        change=_heads(results) | summary.change_facts(results),
        settings=summary.settings(results),
        costs=summary.layer_costs(results),
        branches=summary.branches(results),
        header=header,
        rows=rows,
        notes=notes(results["stages"], results["timing"]),
        comparison=summary.comparison(results),
        needs=needs,
        loading=code,
        loads=results.get("loads") or [vars(answer) for answer in loads_where(folder)],
        command=summary.command_lines(results["command"]),
        machine={"seed": results["seed"], "device": results["device"], **results["versions"]},
    )  # fmt: skip


def _loading(folder: Path, task_type: str, name: str) -> tuple[str, str]:
    """What the model needs, as the card's template calls it, and the code that loads it."""
    automatic = _AUTO_CLASSES.get(task_type, "Model")
    if (folder / ADAPTERS).is_file():
        return "peft", f"from peft import AutoPeft{automatic}\n\nmodel = AutoPeft{automatic}.from_pretrained({name})"
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})"
    if (folder / ONNX).is_file():
        return "onnx", (
            "from transformers import AutoTokenizer\nfrom transformers.exporters import ExportedModel\n\n"
            f'model = ExportedModel.from_pretrained({name}, device="cpu")\n{tokenizer}\n'
            'logits = model(**tokenizer("A sentence.", return_tensors="pt")).logits'
        )
    if loads_without_us(folder):
        return "transformers", (
            f"from transformers import Auto{automatic}, AutoTokenizer\n\n"
            f"model = Auto{automatic}.from_pretrained({name})\n{tokenizer}"
        )
    return "hf_attnkit", (
        "import hf_attnkit\nfrom transformers import AutoTokenizer\n\n"
        f"model = hf_attnkit.load_pretrained({name})\n{tokenizer}"
    )


def _heads(results: Results) -> dict[str, str]:
    """Numbers of heads per layer, before and after; those that are as they were are left out."""
    of_model = [stage for number, stage in enumerate(results["stages"]) if number != results["control"]]
    if not of_model:
        return {}
    first, last = of_model[0], of_model[-1]
    names = {"num_heads": "query heads per layer", "num_key_value_heads": "key/value heads per layer"}
    found = {
        called: f"{heads(first[key])}, now {heads(last[key])}"
        for key, called in names.items()
        if first[key] != last[key]
    }
    if last["num_heads"] == last["num_key_value_heads"]:  # each head has its own
        found.pop("key/value heads per layer", None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="of a finished run")
    parser.add_argument("--name", help="the model's repository on the hub; by default the folder's name")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    try:
        write_card(folder, read_results(folder), arguments.name or model_name(str(folder.resolve())))
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(folder / "README.md")


if __name__ == "__main__":
    main()
