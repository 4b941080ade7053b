"""The model card: metadata as the hub reads it, true words, code that loads the model, and no markup from a run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from support.models import build
from support.results import PRUNED, decoder, made, measured_only, planted, predicted_only, stage, with_control

import hf_attnkit
from hf_attnkit.experiment.report import card as card_module
from hf_attnkit.experiment.report.card import base_model, loads_without_us, write_card


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("bert", "sequence").save_pretrained(folder)
    return folder


def written(folder: Path, results: dict[str, Any], name: str = "cola-pruned") -> ModelCard:
    write_card(folder, results, name)
    return ModelCard.load(folder / "README.md")


def metadata(card: ModelCard) -> ModelCardData:
    return ModelCardData(**card.data.to_dict())  # raises for a model index that cannot be read


def test_metadata(model_folder) -> None:
    data = metadata(written(model_folder, with_control()))
    assert (data.library_name, data.language, data.pipeline_tag) == ("transformers", "en", "text-classification")
    assert data.base_model == "owner/MiniLM" and data.datasets == ["nyu-mll/glue"]
    assert data.tags == ["hf_attnkit", "head-pruning", "generated_from_trainer"]
    # Of the recovered model: the control is not the one that is saved.
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "matthews_correlation": 0.45, "accuracy": 0.8,
    }  # fmt: skip
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_name) == ("nyu-mll/glue", "GLUE CoLA")
    assert (result.dataset_config, result.dataset_split) == ("cola", "validation")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"path": "local"}, None),
        ({"path": "local", "base_model": "google-bert/bert-base-uncased"}, "google-bert/bert-base-uncased"),
        ({"path": "owner/MiniLM", "base_model": None}, "owner/MiniLM"),
    ],
)
def test_the_base_model_is_one_on_the_hub(model, expected, model_folder) -> None:
    assert metadata(written(model_folder, made(model=PRUNED["model"] | model))).base_model == expected


def test_a_task_outside_glue_is_none_of_it(model_folder) -> None:
    data = PRUNED["data"] | {"name": "reviews", "hub_path": "local", "config": None, "is_benchmark": False,
                             "language": None}  # fmt: skip
    card = written(model_folder, made(data=data, task="reviews"))
    assert "GLUE" not in card.content and metadata(card).datasets is None and metadata(card).language is None
    result = metadata(card).eval_results[0]
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == ("reviews", "reviews", None)
    assert "reviews (local files)" in card.text


@pytest.mark.parametrize(
    ("kind", "facts", "tags"),
    [
        ("conversion", {"method": "pca"}, ["grouped-query-attention"]),
        ("swap", {"attention": ["sliding_window", "sliding_window", "sdpa"]}, ["attention-swap", "sliding_window"]),
        ("adapters", {}, ["lora"]),
        ("fine-tuning", {}, []),
        ("head-merging", {"importance": "entropy"}, ["head-merging"]),  # a recipe's own word
    ],
)
def test_tags_follow_the_change_and_not_the_keys(kind, facts, tags, model_folder) -> None:
    change = {"kind": kind, "title": "something done", "facts": facts}
    card = written(model_folder, made(change=change, method="pca"))
    assert metadata(card).tags == ["hf_attnkit", *tags, "generated_from_trainer"]
    assert card.text.lstrip().startswith("# MiniLM, something done, CoLA\n")


@pytest.mark.parametrize("results", [measured_only(), predicted_only()])
def test_a_card_says_only_what_happened(results, model_folder) -> None:
    card = written(model_folder, results)
    assert not re.search("fine-tuned|trained on|recovered|8,551|training examples|[Cc]omparison", card.text)
    assert "- training: none in this run" in card.text and "## Change" not in card.text
    assert "generated_from_trainer" not in metadata(card).tags
    before = card.text.partition("## What loads it")[0]
    assert ("## Results" in before) == bool(results["stages"]) == ("| --- |" in before)
    assert "\n\n\n" not in card.text


def test_results_and_comparison(model_folder) -> None:
    text = written(model_folder, with_control()).text
    rows = [line for line in text.partition("## What loads it")[0].splitlines() if line.startswith("|")]
    assert rows[0].startswith("| stage | matthews_correlation | accuracy | share of control | heads |")
    assert rows[1].startswith("| --- | ---: |") and len({row.count("|") for row in rows}) == 1 and len(rows) == 6
    assert "| recovered | 0.4500 (-0.0500) | 0.8000 (+0.0000) | 75.0% | 8 5 7 6 4 6 | 36,000 (-50.0%) |" in rows[4]
    assert "0.840 (0.830 to 0.850)" in rows[4] and "75.0% of the control" in text
    assert "query heads per layer: 6 x 12, now 8 5 7 6 4 6" in text
    assert "trained as long is missing" in written(model_folder, made()).text
    assert "key/value heads per layer: 2 x 4, now 2 x 1" in written(model_folder, decoder()).text


def test_metrics_without_a_value_are_no_result_and_have_the_hubs_names(model_folder) -> None:
    stages = [stage("baseline", 0.0) | {"metrics": {"pearson": 0.5, "spearmanr": float("nan")}}]
    (result,) = metadata(written(model_folder, made(stages=stages, timing=None))).eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("pearsonr", "pearson", 0.5)


@pytest.mark.parametrize("part", ["", "[:4]"])
def test_each_of_two_dev_sets_is_a_split(part, model_folder) -> None:
    metrics = {"accuracy_matched": 0.5, "accuracy_mismatched": 0.25}
    splits = [f"validation_{of}{part}" for of in ("matched", "mismatched")]
    data = PRUNED["data"] | {"splits": {"train": "train", "evaluation": ", ".join(splits)}, "note": "a part of it"}
    stages = [stage("baseline", 0.0) | {"metrics": metrics}]
    found = metadata(written(model_folder, made(stages=stages, data=data, timing=None))).eval_results
    assert [(one.metric_type, one.dataset_split, one.metric_value) for one in found] == [
        ("accuracy", splits[0], 0.5), ("accuracy", splits[1], 0.25),
    ]  # fmt: skip
    assert found[0].dataset_name == "GLUE CoLA (a part of it)"


def test_a_metric_whose_name_ends_like_no_split_is_itself(model_folder) -> None:
    stages = [stage("baseline", 0.0) | {"metrics": {"exact_matched": 0.5}}]
    (result,) = metadata(written(model_folder, made(stages=stages, timing=None))).eval_results
    assert (result.metric_type, result.dataset_split) == ("exact_matched", "validation")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)


def test_the_command_is_the_one_that_ran(model_folder) -> None:
    command = "python x.py --name 'it`s ```quoted```' --flag --list a b"
    text = written(model_folder, made(command=command)).text
    fence = "````"
    (found,) = re.findall(rf"^{fence}bash\n(.*?)\n{fence}$", text, re.MULTILINE | re.DOTALL)
    assert shlex.split(found.replace("\\\n", "")) == shlex.split(command)
    (plain,) = blocks(written(model_folder, made()).text, "bash")
    assert shlex.split(plain.replace("\\\n", "")) == shlex.split(PRUNED["command"])


@pytest.mark.parametrize(
    ("family", "change", "plain"),
    [("llama", lambda model: hf_attnkit.convert_to_gqa(model, 2), True),
     ("bert", lambda model: model, True),
     ("bert", lambda model: hf_attnkit.convert_to_gqa(model, 2), False),
     ("llama", lambda model: hf_attnkit.prune_heads(model, {0: [1]}), False),
     ("llama", lambda model: hf_attnkit.swap_attention(model, "sliding_window", window=4), False)],
    ids=["llama, uniform", "bert, as it was", "bert, converted", "llama, pruned unevenly", "llama, swapped"],
)  # fmt: skip
def test_the_code_of_the_card_loads_the_model(family, change, plain, tmp_path) -> None:
    change(build(family, "sequence")).save_pretrained(tmp_path)
    assert loads_without_us(tmp_path) is plain
    (code,) = blocks(written(tmp_path, made(), name=tmp_path.name).text, "python")
    assert ("AutoModelForSequenceClassification" in code) == plain
    # The tokenizer is not saved here; the name is of a folder next to where the code runs.
    names: dict[str, Any] = {}
    lines = [line for line in code.splitlines() if not line.startswith("tokenizer")]
    exec("\n".join(lines).replace(json.dumps(tmp_path.name), json.dumps(str(tmp_path))), names)
    assert names["model"].config.num_labels == build(family, "sequence").config.num_labels


def test_a_language_model_is_loaded_as_one(tmp_path) -> None:
    build("llama", "causal").save_pretrained(tmp_path)
    (code,) = blocks(written(tmp_path, decoder()).text, "python")
    assert "AutoModelForCausalLM.from_pretrained" in code


def test_a_folder_of_adapters_is_no_model(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    card = written(tmp_path, made(lora=True))
    assert card.data.library_name == "peft" and "AutoPeftModelForSequenceClassification" in card.text
    assert "load_pretrained" not in card.text and "lora" in metadata(card).tags


MARKUP = "</b><script>alert(1)</script> [x](javascript:y) `z` |\n\n# heading\n---\n*a* _b_ \\"


def test_no_text_of_a_run_is_markup(model_folder) -> None:
    for results in (with_control(), decoder(), predicted_only()):
        bad = planted(results, lambda word: f"{word}{MARKUP}" if word != "local" else word)
        bad["command"] = "python x.py --name '<script>alert(1)</script>'"
        card = written(model_folder, bad, name="a\"b<script>`'")
        metadata(card)
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
        inner = [child for token in tokens for child in token.children or []]
        # Only what the template writes: a link, emphasis or an element would have a type of its own.
        assert {token.type for token in inner} <= {"text", "code_inline", "text_special"}
        assert {token.content for token in inner if token.type == "code_inline"} <= {"pip install hf_attnkit"}
        assert not any("html" in token.type for token in tokens)
        assert next(token.tag for token in tokens if token.type == "heading_open") == "h1"
        headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"][1:]
        assert set(headings) <= {"Change", "Settings", "Results", "Use", "What loads it", "Run it again"}
        rows = card.text.partition("## What loads it")[2].count("\n| ") - 1
        assert sum(token.type == "tr_open" for token in tokens) == (len(results["stages"]) or -1) + 1 + rows
        assert sum("<script>alert(1)</script>" in token.content for token in inner) > 5
        assert "--name '<script>alert(1)</script>'" in card.text


def test_no_folder_of_this_machine_is_shown(model_folder) -> None:
    folder = "/home/jane/secret place/"
    for results in (with_control(), decoder(), predicted_only()):
        bad = planted(results, lambda word: f"{folder}{word}")
        bad["command"] = f"python '{folder}x.py' --data_dir '{folder}data'"
        content = written(model_folder, bad, name=f"{folder}out").content
        assert not re.search("secret|jane|/home", content) and 'from_pretrained("out")' in content


def test_the_card_is_made_again_from_the_folder(model_folder, monkeypatch, capsys) -> None:
    (model_folder / "results.json").write_text(json.dumps(made()))
    content = written(model_folder, made(), name="owner/cola").content
    (model_folder / "README.md").unlink()
    monkeypatch.setattr("sys.argv", ["card.py", str(model_folder), "--name", "owner/cola"])
    card_module.main()
    assert (model_folder / "README.md").read_text(encoding="utf-8") == content
    assert "README.md" in capsys.readouterr().out


def test_a_folder_without_results_is_named_and_left(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["card.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        card_module.main()
    assert stopped.value.code == 1 and str(tmp_path) in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_local_checkpoint_began_as_what_its_own_card_names(tmp_path) -> None:
    assert base_model("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert base_model(str(tmp_path)) is None
    for named in ("google-bert/bert-base-uncased", "\n- google-bert/bert-base-uncased"):
        (tmp_path / "README.md").write_text(f"---\nbase_model: {named}\n---\n# cola\n")
        assert base_model(str(tmp_path)) == "google-bert/bert-base-uncased"
