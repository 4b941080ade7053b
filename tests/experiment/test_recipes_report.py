"""What a recipe leaves behind: the report, the model card, the costs of each stage, the log of entropies."""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import finetune_glue
import huggingface_hub
import pytest
import torch
import transformers.trainer
import uptrain_gqa_glue
from benchmarks import overhead as benchmark_overhead
from huggingface_hub import ModelCard, ModelCardData
from support.models import build
from support.recipe_runs import flags, run
from transformers import AutoModelForSequenceClassification

import hf_attnkit
from hf_attnkit.experiment import run as base_run
from hf_attnkit.experiment.costs import Laps
from hf_attnkit.experiment.report import card as model_card
from hf_attnkit.experiment.report import page as html_report
from hf_attnkit.experiment.report.stage_table import model_name

only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)
VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects tags, titles of charts and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A conversion that trained with everything logged: its folder and results."""
    output = tmp_path_factory.mktemp("finished") / "out"
    more = ("--num_key_value_heads", "2", "--entropy_every_n_steps", "2", "--logging_steps", "1", "--eval_strategy",
            "steps", "--eval_steps", "2")  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        return output, run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, output, *more))


def test_every_stage_tells_what_it_costs(finished) -> None:
    _, results = finished
    baseline, changed, recovered = results["stages"]
    # Keys and values of 2 layers, 4 heads of 8 numbers, 4 bytes each.
    assert baseline["key_value_bytes_per_token"] == 2 * 2 * 4 * 8 * 4
    assert changed["key_value_bytes_per_token"] == recovered["key_value_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    for stage in results["stages"]:
        assert 0 < stage["seconds_per_batch"] < stage["evaluation_seconds"] + 60
        assert stage["timed_batches"]["number"] == 5  # 40 sentences, 8 a batch
        assert stage["timed_batches"]["shape"][0] == 8 and stage["timed_batches"]["shape"][1] <= 24
        assert min(stage["peak_memory_bytes"], stage["work_peak_memory_bytes"]) > 2**20
        assert "resident" in stage["peak_memory_of"] and stage["work_seconds"] > 0
    assert baseline["timed_batches"] == recovered["timed_batches"]
    assert recovered["work_seconds"] >= recovered["training_seconds"] > 0 and "training_seconds" not in changed
    assert "CPU" in results["device"]


def test_peak_memory_begins_anew_with_each_lap() -> None:
    laps, size = Laps(torch.device("cpu")), 256 << 20
    torch.ones(size // 4).sum()
    _, large = laps.lap()
    _, small = laps.lap()
    if "most so far" in large["peak_memory_of"]:
        assert small["peak_memory_bytes"] >= large["peak_memory_bytes"]  # macOS: it cannot be forgotten
    else:
        assert large["peak_memory_bytes"] - small["peak_memory_bytes"] > 0.9 * size


def test_a_model_is_called_by_what_tells_it_from_others() -> None:
    assert model_name("bert-base-uncased") == "bert-base-uncased" and model_name("outputs/cola") == "cola"
    assert model_name("/x/outputs/gqa/cola/seed-0") == "gqa-cola-seed-0" and model_name("seed-0") == "seed-0"


@only_bert
def test_the_loss_is_a_curve_without_being_asked_for(checkpoint, tmp_path, monkeypatch) -> None:
    run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path, "--max_train_samples", "16"))
    assert "<h2>Training</h2><div class='charts'>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    (training,) = base_run.parse_arguments(argv=["--output_dir", str(tmp_path), "--logging_steps", "500"])
    assert training.logging_steps == 500


@only_bert
def test_timing_and_entropies_leave_training_as_it_is(checkpoint, tmp_path, monkeypatch) -> None:
    """Bit for bit: dropout is on, so a random number more or less would show."""
    more = ("--num_key_value_heads", "2", "--learning_rate", "1e-2", "--entropy_every_n_steps")
    run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "with", *more, "1"))
    monkeypatch.setattr(base_run, "time_per_batch", lambda *_: {})
    run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "without", *more, "0"))
    states = [hf_attnkit.load_pretrained(tmp_path / name).state_dict() for name in ("with", "without")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_entropies_are_logged_at_the_interval_asked_for(finished) -> None:
    history = json.loads((finished[0] / "trainer_state_1.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "attention_entropy/layer_1/mean" in entry] == [1, 2, 4]


def words_of(text: str) -> list[str]:
    """The command that stands in a text, as a shell reads it."""
    lines = re.search(r"python (?:.*\\\n)*.*", text[text.index("python ") :])
    assert lines is not None
    return shlex.split(lines[0].replace("\\\n", ""))


def test_the_report_stands_alone_and_is_made_again_from_the_folder(finished, monkeypatch, capsys) -> None:
    output, results = finished
    content = (output / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|@import|url\(", content)
    text = "".join(page.words)
    for stage in results["stages"]:
        assert stage["stage"] in text and f"{stage['parameters']:,}" in text
    assert shlex.split(results["command"]) == words_of("\n".join(page.words))
    assert results["versions"]["torch"] in text and "seed" in text
    # Loss, learning rate, two metrics; entropies' mean and minimum: no heads were scored.
    assert [words for words in page.words if words in ("Loss", "Learning rate")] == ["Loss", "Learning rate"]
    assert page.count("figure") == 6 and page.count("figcaption") == 6
    assert "layer 1, step 4: " in text and "evaluation, step 2: " in text

    (output / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["html_report.py", str(output)])
    html_report.main()
    assert (output / "report.html").read_text(encoding="utf-8") == content


def test_the_card_is_what_the_hub_reads_and_its_code_loads_the_model(finished) -> None:
    output, results = finished
    card = ModelCard.load(output / "README.md")
    data = ModelCardData(**card.data.to_dict())  # raises for a model index that cannot be read
    assert (data.library_name, data.language, data.pipeline_tag) == ("transformers", "en", "text-classification")
    assert {"hf_attnkit", "grouped-query-attention"} <= set(data.tags)
    assert data.base_model is None  # a local folder without a card
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured == results["stages"][-1]["metrics"]
    assert "key/value heads per layer: 2 x 4, now 2 x 2" in card.text
    assert shlex.split(results["command"]) == words_of(card.text) and "| recovered |" in card.text
    if "llama" in results["model"]:
        assert "AutoModelForSequenceClassification.from_pretrained" in card.text and "load_pretrained" not in card.text
        stock = AutoModelForSequenceClassification.from_pretrained(output)
    else:
        assert "hf_attnkit.load_pretrained(" in card.text
        stock = hf_attnkit.load_pretrained(output)
    assert stock.config.num_key_value_heads == 2


def changed(kind: str) -> Any:
    if kind == "llama, uniform":
        return hf_attnkit.convert_to_gqa(build("llama", "sequence"), 2)
    if kind == "bert, as it was":
        return build("bert", "sequence")
    if kind == "bert, converted":
        return hf_attnkit.convert_to_gqa(build("bert", "sequence"), 2)
    if kind == "llama, pruned unevenly":
        return hf_attnkit.prune_heads(build("llama", "sequence"), {0: [1]})
    return hf_attnkit.swap_attention(build("llama", "sequence"), "sliding_window", window=4)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [("llama, uniform", True), ("bert, as it was", True), ("bert, converted", False), ("llama, pruned unevenly", False),
     ("llama, swapped", False)],
)  # fmt: skip
def test_the_card_knows_which_models_transformers_loads_itself(kind: str, plain: bool, tmp_path: Path) -> None:
    changed(kind).save_pretrained(tmp_path)
    assert model_card.loads_without_us(tmp_path) is plain


def test_the_base_model_is_that_of_the_folders_own_card(tmp_path: Path) -> None:
    assert model_card.base_model("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert model_card.base_model(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nbase_model: google-bert/bert-base-uncased\n---\n# cola\n")
    assert model_card.base_model(str(tmp_path)) == "google-bert/bert-base-uncased"


STAGE = {"stage": "baseline", "metrics": {"pearson": 0.5, "spearmanr": float("nan")}, "parameters": 10,
         "num_heads": [4, 4], "num_key_value_heads": [4, 4]}  # fmt: skip
RESULTS = {
    "task": "stsb", "data": "GLUE dev set", "model": "out/<b>&'\"", "seed": 1, "train_samples": 9, "device": "CPU",
    "dataset": {"id": "nyu-mll/glue", "name": "GLUE STS-B", "config": "stsb", "split": "validation", "language": "en",
                "task_type": "text-classification"},
    "stages": [STAGE, STAGE | {"stage": "changed", "metrics": {"pearson": 0.25, "spearmanr": 0.5}, "parameters": 9}],
    "command": "python x.py --name '<script>alert(1)</script>'", "versions": {"torch": "2"},
    "importance": "<i>gradient",
}  # fmt: skip


def saved(*rounds: dict) -> dict:
    """What head_importance.json holds."""
    return {"importance": "<i>gradient", "rounds": list(rounds)}


def test_what_comes_from_outside_is_escaped() -> None:
    content = html_report.report_page(
        RESULTS, [[{"step": 1, "eval_<i>": 0.5}]], saved({"scores": [[1.0]], "removed": {}})
    )
    page = Page(content)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert "--name '<script>alert(1)</script>'" in "".join(page.words)


def test_differences_are_to_the_first_stage() -> None:
    text = "".join(Page(html_report.report_page(RESULTS)).words)
    assert "\N{MINUS SIGN}0.2500" in text and "\N{MINUS SIGN}10.0%" in text and "nan" in text


def test_metrics_without_a_value_are_no_result_of_the_card(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    results["stages"] = results["stages"][:1]
    build("bert", "sequence").save_pretrained(tmp_path)
    model_card.write_card(tmp_path, results, "stsb")
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    # The hub's own name of the metric.
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("pearsonr", 0.5, "nyu-mll/glue")


def test_a_folder_of_adapters_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    model_card.write_card(tmp_path, RESULTS, "stsb")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and "AutoPeftModel" in card.text and "load_pretrained" not in card.text


def test_both_dev_sets_of_mnli_are_results() -> None:
    dataset = RESULTS["dataset"] | {"config": "mnli"}
    found = [model_card._result(dataset, f"accuracy_{of}", 0.5) for of in ("matched", "mismatched")]
    assert [(result.metric_type, result.dataset_split) for result in found] == [
        ("accuracy", "validation_matched"), ("accuracy", "validation_mismatched"),
    ]  # fmt: skip
    part = model_card._result(dataset | {"split": "validation[:4]"}, "accuracy_matched", 0.5)
    assert part.dataset_split == "validation_matched[:4]"


SCORES = [[0.5, None, 0.1], [0.2, 0.3, 0.4]]


@pytest.mark.parametrize(
    ("importance", "maps", "crosses"),
    [
        (saved({"scores": SCORES, "removed": {"0": [2], "1": [0, 1]}}), 1, 3),
        (saved({"scores": SCORES, "removed": {"0": [2]}}, {"scores": SCORES, "removed": {}}), 2, 1),
    ],
)
def test_heat_maps_of_one_round_and_of_several(importance, maps, crosses) -> None:
    page = Page(html_report.report_page(RESULTS, (), importance))
    assert page.count("figure") == maps
    titles = [words for words in page.words if words.startswith("layer ") and "head" in words]
    assert len(titles) == 5 * maps
    assert sum(title.endswith(", removed") for title in titles) == crosses


def test_a_training_that_logged_nothing_says_how_to_log() -> None:
    text = "".join(Page(html_report.report_page(RESULTS, [[{"step": 7, "train_loss": 0.5}]])).words)
    assert "Nothing was logged in 7 steps" in text and "--logging_steps" in text


def test_a_folder_without_results_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["html_report.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        html_report.main()
    assert str(tmp_path) in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--hub_token", "secret", "--seed", "1"], ["--hub_token=secret", "--seed", "1"]])
def test_the_command_holds_no_token(given) -> None:
    assert base_run.command(["x.py", *given]) == "python x.py --hub_token=... --seed 1"


def test_flags_mean_the_same_in_each_spelling(tmp_path) -> None:
    (training,) = base_run.parse_arguments(argv=["--output-dir", str(tmp_path), "--do-eval", "--learning-rate=1e-3"])
    assert (training.do_train, training.do_eval, training.learning_rate) == (False, True, 1e-3)


def test_shortened_flags_are_refused(tmp_path) -> None:
    """A shortened --hub_token would stand in the published command."""
    with pytest.raises(ValueError, match="--hub_to"):
        base_run.parse_arguments(argv=["--output_dir", str(tmp_path), "--hub_to", "secret"])


@pytest.mark.parametrize("name", [*base_run.REFUSED, "eval_do_concat_batches"])
def test_flags_that_would_spoil_the_run_are_refused(name, tmp_path, capsys) -> None:
    value = "false" if name == "eval_do_concat_batches" else "true"
    with pytest.raises(SystemExit):
        base_run.parse_arguments(argv=["--output_dir", str(tmp_path), "--use_cpu", f"--{name}", value])
    assert f"--{name}" in capsys.readouterr().err


BAD = [
    (("--entropy_every_n_steps", "-1"), "entropy_every_n_steps -1 must be"),
    (("--entropy_every_n_steps", "5", "--do_eval"), "entropy_every_n_steps 5 has no effect"),
]


@only_bert
@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_intervals_that_cannot_be_honoured_are_named(wrong, message, checkpoint, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=message):
        run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *wrong))
    assert not (tmp_path / "out").exists()


class Hub:
    """What `Trainer` asks of the hub, and what it would have uploaded."""

    repo_id = "someone/cola"

    def create_repo(self, *args: Any, **options: Any) -> Hub:
        return self

    def upload_folder(self, *, folder_path: str, **options: Any) -> None:
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}


@only_bert
def test_what_is_pushed_is_the_whole_folder_with_our_card(checkpoint, tmp_path, monkeypatch) -> None:
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "another")
    more = ("--do_eval", "--push_to_hub", "--hub_model_id", "someone/cola", "--hub_token", "secret")
    run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))
    assert {"README.md", "model.safetensors", "results.json", "report.html", "tokenizer.json"} <= set(hub.files)
    assert hub.files["README.md"].startswith(b"---\n") and b"# someone/cola" in hub.files["README.md"]
    assert "training_args.bin" in hub.files and not any(b"secret" in content for content in hub.files.values())
    assert huggingface_hub.get_token() == "secret"


# The benchmark.


def test_overheads_are_those_of_made_up_times() -> None:
    found = {
        benchmark_overhead.PLAIN: [[1.0] * 100, [2.0] * 100],
        benchmark_overhead.WITHOUT: [[1.0] * 100, [2.0] * 100],
        benchmark_overhead.DEFAULT: [[1.01] * 99 + [2.0], [2.02] * 99 + [4.0]],
    }
    report = benchmark_overhead.summary(found, [1.5, 1.5])
    rows = report["rows"]
    assert rows[benchmark_overhead.WITHOUT]["ratio"] == 1.0
    assert rows[benchmark_overhead.DEFAULT]["ratio_quartiles"] == pytest.approx([1.01, 1.01])
    step = rows[benchmark_overhead.DEFAULT]["step_seconds"]
    assert report["entropy_overhead"] == pytest.approx(1.5 / (100 * step))
    assert report["overhead"] == pytest.approx(rows[benchmark_overhead.DEFAULT]["ratio"] - 1 + 0.015 / step)


def test_the_benchmark_runs_each_kind_and_times_every_step_but_the_first(tmp_path, monkeypatch, capsys) -> None:
    for module in (base_run, benchmark_overhead):
        monkeypatch.setattr(module, "ENTROPY_EVERY_N_STEPS", 2)
    monkeypatch.setattr(benchmark_overhead, "STEPS", 3)
    sizes = ("--rounds", "1", "--steps", "4", "--layers", "1", "--hidden_size", "16", "--heads", "2", "--length", "8")
    monkeypatch.setattr("sys.argv", ["x", *sizes, "--output_file", str(tmp_path / "overhead.json")])
    benchmark_overhead.main()
    saved = json.loads((tmp_path / "overhead.json").read_text())
    assert {kind: [len(turn) for turn in turns] for kind, turns in saved["seconds"].items()} == {
        benchmark_overhead.PLAIN: [3], benchmark_overhead.WITHOUT: [3], benchmark_overhead.DEFAULT: [3],
    }  # fmt: skip
    assert saved["measurement_seconds"] > 0 and "of plain" in capsys.readouterr().out
    assert torch.tensor(saved["seconds"][benchmark_overhead.PLAIN]).min() > 0
    monkeypatch.setattr("sys.argv", ["x", "--steps", "2"])
    with pytest.raises(SystemExit):
        benchmark_overhead.main()


def test_the_benchmark_of_overheads_runs(tmp_path, monkeypatch) -> None:
    small = ("--rounds", "2", "--batch_size", "1", "--length", "4", "--layers", "1", "--hidden_size", "8")
    output = tmp_path / "overhead.json"
    monkeypatch.setattr(sys, "argv", ["x", *small, "--heads", "2", "--output_file", str(output)])
    benchmark_overhead.main()
    assert [len(turns) for turns in json.loads(output.read_text())["seconds"].values()] == [2, 2, 2]
