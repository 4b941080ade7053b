"""The model card (Mitchell et al. 2019, arXiv 1810.03993) of a recipe's model, with the metadata that the hub reads.

    python -m hf_attnkit.experiment.report.card OUTPUT_DIR

writes README.md again, from the folder's results.json and config.json alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from hf_attnkit import available_attentions
from hf_attnkit.experiment.files import write_text
from hf_attnkit.experiment.report.stage_table import command_lines, heads, model_name, notes, settings, stage_table
from hf_attnkit.loading import skeleton

ADAPTERS = "adapter_config.json"  # of a folder that holds adapters and no model
# A task's metric -> the hub's name for it, where they differ.
_HUB_METRICS = {"pearson": "pearsonr"}
_TAGS = {"importance": "head-pruning", "method": "grouped-query-attention", "lora": "lora", "distill": "distillation"}


def write_card(folder: Path, results: Mapping[str, Any], name: str) -> None:
    """Write README.md beside a saved model.

    Args:
        folder: holds the model.
        results: what results.json holds.
        name: of the model: its repository on the hub, or its folder.
    """
    card = ModelCard(f"---\n{_metadata(folder, results, name).to_yaml()}\n---\n\n{_text(folder, results, name)}")
    write_text(folder / "README.md", str(card))


def base_model(path: str) -> str | None:
    """The hub's name of the model that a checkpoint began as: a folder's own card says so, if it has one."""
    if not Path(path).is_dir():
        return path
    card = Path(path) / "README.md"
    if not card.is_file():
        return None
    named = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
    return named[0] if isinstance(named, list) else named


def loads_without_us(folder: Path) -> bool:
    """Whether Transformers' own class, built from the saved config, has the saved model's sizes and attention."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "hf_attnkit", None) is not None:
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


def _metadata(folder: Path, results: Mapping[str, Any], name: str) -> ModelCardData:
    dataset = results["dataset"]
    metrics = results["stages"][-1]["metrics"] if results["stages"] else {}
    evaluated = [_result(dataset, metric, value) for metric, value in metrics.items() if math.isfinite(value)]
    return ModelCardData(
        library_name="peft" if (folder / ADAPTERS).is_file() else "transformers",
        base_model=base_model(results["model"]),
        datasets=[dataset["id"]] if dataset["id"] else None,
        language=dataset["language"],
        metrics=list(dict.fromkeys(result.metric_type for result in evaluated)) or None,
        pipeline_tag=dataset["task_type"],
        tags=["hf_attnkit", *_tags(results), "generated_from_trainer"],
        model_name=name,
        eval_results=evaluated or None,
    )


def _tags(results: Mapping[str, Any]) -> list[str]:
    named = [tag for fact, tag in _TAGS.items() if results.get(fact)]
    return named + [kind for kind in dict.fromkeys(results.get("attention", [])) if kind in available_attentions()]


def _result(dataset: Mapping[str, Any], metric: str, value: float) -> EvalResult:
    """One number of the last stage. MNLI's two dev sets are splits, which stand in the metric's name."""
    plain, _, of = metric.rpartition("_") if metric.endswith("matched") else (metric, "", "")
    return EvalResult(
        task_type=dataset["task_type"],
        dataset_type=dataset["id"] or dataset["name"],
        dataset_name=dataset["name"],
        dataset_config=dataset["config"],
        dataset_split=dataset["split"].replace("validation", f"validation_{of}") if of else dataset["split"],
        metric_type=_HUB_METRICS.get(plain, plain),
        metric_name=metric,
        metric_value=value,
    )


def _text(folder: Path, results: Mapping[str, Any], name: str) -> str:
    header, rows = stage_table(results["stages"])
    cells = [[f"{cell.text} ({cell.difference})" if cell.difference else cell.text for cell in row] for row in rows]
    sections = [
        f"# {name}",
        f"`{results['model']}`, {_what(results)}, and measured on {results['task']} ({results['data']}) with "
        "hf_attnkit, attention surgery for Transformers.",
        "## What was changed",
        _changes(results),
        "## Results",
        _table(header, cells) if rows else "Not measured (`--do_train` alone).",
        *([f"In brackets: the difference to the first stage. {notes(results['stages'])}"] if rows else []),
        "## Use",
        _use(folder, results, name),
        "## Reproduce",
        f"```bash\n{command_lines(results['command'])}\n```",
        f"Seed {results['seed']}; {results['train_samples']:,} training examples; {results['device']}; "
        + ", ".join(f"{package} {number}" for package, number in results["versions"].items())
        + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _what(results: Mapping[str, Any]) -> str:
    if results.get("attention"):
        return f"run with {', '.join(dict.fromkeys(results['attention']))} attention"
    if results.get("method"):
        return "converted to grouped-query attention"
    return "with attention heads removed" if results.get("importance") else "fine-tuned"


def _changes(results: Mapping[str, Any]) -> str:
    lines = []
    if results["stages"]:
        first, last = results["stages"][0], results["stages"][-1]
        for key, called in (("num_heads", "query heads"), ("num_key_value_heads", "key/value heads")):
            before, after = heads(first[key]), heads(last[key])
            lines.append(f"- {called} per layer: {before}" + (f", now {after}" if after != before else ", unchanged"))
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in settings(results).items())])


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *(["---:"] * (len(header) - 1))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _use(folder: Path, results: Mapping[str, Any], name: str) -> str:
    if (folder / ADAPTERS).is_file():
        return (
            "These are adapters of the model above; `pip install peft`, and\n\n```python\n"
            "from peft import AutoPeftModelForSequenceClassification\n\n"
            f'model = AutoPeftModelForSequenceClassification.from_pretrained("{name}")\n```'
        )
    kind = "CausalLM" if results["dataset"]["task_type"] == "text-generation" else "SequenceClassification"
    if loads_without_us(folder):
        return (
            "Transformers loads it as any model:\n\n```python\n"
            f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
            f'model = AutoModelFor{kind}.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
        )
    return (
        "Transformers' own class cannot express its heads or its attention. Install hf_attnkit:\n\n"
        "```bash\npip install hf_attnkit\n```\n\n```python\n"
        "import hf_attnkit\nfrom transformers import AutoTokenizer\n\n"
        f'model = hf_attnkit.load_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="of a finished run")
    parser.add_argument("--name", help="the model's repository on the hub; by default the folder's name")
    arguments = parser.parse_args()
    file = arguments.folder / "results.json"
    if not file.is_file():
        parser.exit(1, f"{parser.prog}: {file} does not exist: name the --output_dir of a finished run\n")
    write_card(
        arguments.folder, json.loads(file.read_text()), arguments.name or model_name(str(arguments.folder.resolve()))
    )


if __name__ == "__main__":
    main()
