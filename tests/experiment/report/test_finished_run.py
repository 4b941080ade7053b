"""What real runs leave behind, on a tiny model: page, card, costs, logs, and what is pushed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import finetune_glue
import huggingface_hub
import prune_heads_glue
import pytest
import transformers.trainer
import uptrain_gqa_glue
from huggingface_hub import HfApi, ModelCard, ModelCardData, RepoUrl
from support import quick
from support.html_page import Page
from support.page_data import PageData
from support.recipe_runs import flags, run
from transformers import AutoModelForSequenceClassification

import hf_attnkit
from hf_attnkit.experiment.report import attention_page
from hf_attnkit.experiment.report import page as page_module
from hf_attnkit.models.layers import attention_layers

pytestmark = pytest.mark.slow
only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A conversion with a control, that trained with everything logged: its folder and results."""
    output = tmp_path_factory.mktemp("finished") / "out"
    more = ("--num_key_value_heads", "2", "--entropy_every_n_steps", "2", "--logging_steps", "1", "--eval_strategy",
            "steps", "--eval_steps", "2", "--control")  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(attention_page, "EXAMPLES", quick.EXAMPLES)
        return output, run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, output, *more))


def text_of(folder: Path) -> str:
    return Page((folder / "report.html").read_text(encoding="utf-8")).text


def test_the_page_links_what_heads_attend_to_before_and_after(finished) -> None:
    output, _ = finished
    links = [
        attrs["href"] for tag, attrs in Page((output / "report.html").read_text(encoding="utf-8")).tags if tag == "a"
    ]
    assert links == ["attention.html"]
    data = PageData((output / "attention.html").read_text(encoding="utf-8")).data
    assert data["names"] == ["untouched", "recovered"] and len(data["examples"]) == quick.EXAMPLES == 3
    for example in data["examples"]:
        before, after = example["maps"]
        assert [each["groups"] for each in after] == [2, 2] != [each["groups"] for each in before]
        assert example["sequences"][0]["is_text"] and all(each["total"][0] > 0 for each in example["differences"])
    assert "of the dev set" in " ".join(data["notes"])


def test_every_stage_says_what_it_costs(finished) -> None:
    _, results = finished
    stages = {stage["stage"]: stage for stage in results["stages"]}
    is_decoder = stages["baseline"]["key_value_bytes_per_token"] is not None
    if is_decoder:
        # Keys and values of 2 layers, 4 heads of 8 numbers, 4 bytes each.
        assert stages["baseline"]["key_value_bytes_per_token"] == 2 * 2 * 4 * 8 * 4
        assert stages["recovered"]["key_value_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    for stage in results["stages"]:
        assert min(stage["peak_memory_bytes"], stage["work_peak_memory_bytes"]) > 2**20
        assert "resident" in stage["peak_memory_of"] and stage["work_seconds"] > 0
    assert stages["recovered"]["work_seconds"] >= stages["recovered"]["training_seconds"] > 0
    assert "training_seconds" not in stages["changed"] and "CPU" in results["device"]


def test_the_page_tells_the_run_and_is_made_again_from_the_folder(finished, monkeypatch) -> None:
    output, results = finished
    content = (output / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    for stage in results["stages"]:
        assert stage["stage"] in page.text and f"{stage['parameters']:,}" in page.text
    assert results["change"]["title"] in page.text
    assert "Control: the untouched model, trained as long, has" in page.text
    assert "Time ratio" in page.text and "quartiles" in page.text
    shown = shlex.split("\n".join(page.words).split("python ", 1)[1].split("\n\n")[0].replace("\\\n", ""))
    assert shown[: len(shlex.split(results["command"])) - 1] == shlex.split(results["command"])[1:]
    # Loss, learning rate, metrics and entropies, of the training and of the control.
    assert [words for words in page.words if words in ("Loss", "Learning rate")] == ["Loss", "Learning rate"] * 2
    assert "layer 1, step 4: " in page.text and "evaluation, step 2: " in page.text
    assert str(output.parent) not in content and str(Path.home()) not in content
    (output / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["page.py", str(output)])
    page_module.main()
    assert (output / "report.html").read_text(encoding="utf-8") == content


def test_the_card_is_what_the_hub_reads_and_its_code_loads_the_model(finished) -> None:
    output, results = finished
    card = ModelCard.load(output / "README.md")
    data = ModelCardData(**card.data.to_dict())  # raises for a model index that cannot be read
    assert (data.library_name, data.language, data.pipeline_tag) == ("transformers", "en", "text-classification")
    assert {"hf_attnkit", "grouped-query-attention", "generated_from_trainer"} <= set(data.tags)
    assert data.base_model is None  # a local folder that does not say what it was made from
    recovered = next(stage for stage in results["stages"] if stage["stage"] == "recovered")
    assert {result.metric_type: result.metric_value for result in data.eval_results} == recovered["metrics"]
    assert "not GLUE" in card.content and "key/value heads per layer: 2 x 4, now 2 x 2" in card.text
    assert "| recovered |" in card.text and "| control |" in card.text and str(output.parent) not in card.content
    if results["model"]["model_type"] == "llama":
        use = card.text.partition("## What loads it")[0]
        assert "AutoModelForSequenceClassification.from_pretrained" in use and "load_pretrained" not in use
        stock = AutoModelForSequenceClassification.from_pretrained(output)
    else:
        assert "hf_attnkit.load_pretrained(" in card.text
        stock = hf_attnkit.load_pretrained(output)
    assert {layer.num_key_value_heads for layer in attention_layers(stock)} == {2}


def test_entropies_are_logged_at_the_interval_asked_for(finished) -> None:
    history = json.loads((finished[0] / "trainer_state_1.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "attention_entropy/layer_1/mean" in entry] == [1, 2, 4]


@only_bert
def test_a_run_that_only_measures_says_so(checkpoint, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path, "--do_eval"))
    card = ModelCard.load(tmp_path / "README.md")
    for text in (text_of(tmp_path), card.text):
        assert "none in this run" in text and "40 examples" in text
        assert not re.search("fine-tuned|trained on|training examples|recovered", text)
    assert results["change"] is None and "generated_from_trainer" not in card.data.tags


@only_bert
def test_pruning_draws_its_heads(checkpoint, tmp_path, monkeypatch) -> None:
    more = ("--prune_fraction", "0.5", "--score_samples", "8", "--refit_samples", "8", "--do_eval")
    run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path, *more))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    titles = [words for words in page.words if re.fullmatch(r"layer \d+, head \d+: .*", words)]
    assert len(titles) == 8 and sum(title.endswith(", removed") for title in titles) == 4
    assert "half of the attention heads removed" in page.text
    assert (tmp_path / "head_importance.png").read_bytes().startswith(b"\x89PNG")


@only_bert
def test_the_loss_is_a_curve_without_being_asked_for(checkpoint, tmp_path, monkeypatch) -> None:
    run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path, "--max_train_samples", "32"))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert sum(words.startswith("training, step ") for words in page.words) == 2


@only_bert
def test_entropies_leave_training_as_it_is(checkpoint, tmp_path, monkeypatch) -> None:
    """Bit for bit: dropout is on, so a random number more or less would show."""
    more = ("--num_key_value_heads", "2", "--learning_rate", "1e-2", "--entropy_every_n_steps")
    run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "with", *more, "1"))
    run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "without", *more, "0"))
    states = [hf_attnkit.load_pretrained(tmp_path / name).state_dict() for name in ("with", "without")]
    assert all(states[0][name].equal(states[1][name]) for name in states[1])


@only_bert
def test_what_is_pushed_is_the_whole_folder_with_our_card(checkpoint, tmp_path, monkeypatch) -> None:
    pushed: dict[str, bytes] = {}

    def keep(*, folder_path: str, **_: Any) -> None:
        pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    hub = create_autospec(HfApi, instance=True)
    hub.create_repo.return_value = create_autospec(RepoUrl, instance=True, repo_id="someone/cola")
    hub.upload_folder.side_effect = keep
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "another")
    more = ("--do_eval", "--push_to_hub", "--hub_model_id", "someone/cola", "--hub_token", "secret")
    run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))
    assert {"README.md", "model.safetensors", "results.json", "report.html", "tokenizer.json"} <= set(pushed)
    assert pushed["README.md"].startswith(b"---\n") and b'from_pretrained("someone/cola")' in pushed["README.md"]
    assert "training_args.bin" in pushed and not any(b"secret" in content for content in pushed.values())
    assert huggingface_hub.get_token() == "secret"
