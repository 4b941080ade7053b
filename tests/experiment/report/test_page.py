"""report.html, parsed: what it shows, that it needs nothing else, and that what comes from a run is text."""

from __future__ import annotations

import json
import re

import pytest
from support.html_page import Page
from support.results import IMPORTANCE, decoder, made, measured_only, planted, predicted_only, with_control

from hf_attnkit.experiment.report import page as page_module
from hf_attnkit.experiment.report.page import report_page, tiles, write_report
from hf_attnkit.experiment.report.results import public

ENTROPIES = {"attention_entropy/layer_0/mean": 0.5, "attention_entropy/layer_0/min": 0.25}
HISTORY = [
    {"step": 1, "loss": 0.9, "learning_rate": 1e-3, **ENTROPIES},
    {"step": 2, "loss": 0.5, "learning_rate": 5e-4, "eval_loss": 0.6, "eval_accuracy": 0.75, "eval_runtime": 3.0},
    {"step": 3, "eval_loss": 0.5, "eval_accuracy": 0.8, "eval_runtime": 3.0, **ENTROPIES},
]


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def test_the_page_needs_nothing_else() -> None:
    content = report_page(with_control(), {"": HISTORY}, IMPORTANCE)
    page = Page(content)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    # Namespaces of SVG are names and are not loaded.
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name.startswith("xmlns") or not re.search(r"https?:", value or ""), (name, value)
            if name.endswith(("src", "href")):
                assert (value or "").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"@import|url\((?!#)", content)
    assert page.count("style") == 1  # a picture brings no rules of its own


def test_title_stages_and_command() -> None:
    page = Page(report_page(made()))
    assert page.text.count("MiniLM, half of the attention heads removed, CoLA") == 2  # of the window and of the page
    for words in ("baseline", "changed", "recovered", "\N{MINUS SIGN}0.2000", "\N{MINUS SIGN}50.0%", "0.830"):
        assert words in page.text
    assert "python recipes/prune_heads_glue.py \\ --model_name_or_path owner/MiniLM" in page.text
    assert "seed42" in page.text.replace(" ", "") and "torch2.13.0" in page.text.replace(" ", "")
    assert "8,551 examples, split train" in page.text


@pytest.mark.parametrize(("results", "kind"), [(measured_only(), "measured"), (predicted_only(), "predicted")])
def test_a_page_says_only_what_happened(results, kind) -> None:
    content = report_page(results)
    page = Page(content)
    text = page.text.lower()
    assert not re.search("fine-tuned|trained on|recovered|8,551|training examples", text)
    assert "none in this run" in text and "comparison" not in text
    assert headings(content) == [
        "What was done",
        *(["Stages"] if kind == "measured" else []),
        "Settings",
        "Run it again",
    ]
    assert page.count("table") == len(headings(content))
    assert not re.search("<tbody>\\s*</tbody>|<dl[^>]*>\\s*</dl>|<tr>\\s*</tr>", content)


def test_without_a_control_the_page_says_that_the_comparison_is_missing() -> None:
    assert "trained as long is missing" in Page(report_page(made())).text
    text = Page(report_page(with_control())).text
    assert "missing" not in text and "75.0% of the control" in text and "share of control" in text


def shown(results: dict) -> dict[str, tuple[str, str]]:
    return {tile.name: (tile.value, tile.detail) for tile in tiles(public(results))}


def test_numbers_to_see_first_are_of_the_last_model_and_not_of_the_control() -> None:
    found = shown(with_control())
    assert found["matthews_correlation"] == ("0.4500", "-0.0500 from 0.5000")
    assert found["share of control"] == ("75.0%", "of the control's 0.6000")
    assert found["attention heads"] == ("36", "-50.0% from 72")
    assert found["time ratio"] == ("0.840", "0.830 to 0.850 of baseline, quartiles")
    assert not {"key/value heads", "KV cache, bytes/token"} & set(found)  # an encoder
    negative = with_control()
    negative["stages"][3]["metrics"]["matthews_correlation"] = -0.1
    assert shown(negative)["difference to control"][0] == "+0.5500"


def test_a_cache_is_a_number_of_decoders_that_have_a_smaller_one() -> None:
    assert shown(decoder())["KV cache, bytes/token"] == ("2,304", "-75.0% from 9,216")
    assert shown(measured_only()) == {"matthews_correlation": ("0.5000", "baseline")} and shown(predicted_only()) == {}


def test_curves_of_each_training() -> None:
    content = report_page(made(), {", 1 of 2": HISTORY, ", 2 of 2": HISTORY[:2]})
    assert "Training, 1 of 2" in headings(content) and "Attention entropy during training, 2 of 2" in headings(content)
    page = Page(content)
    assert "training, step 1: 0.9" in page.words and "layer 0, step 3: 0.5" in page.words
    assert "evaluation, step 3: 0.5" in page.words and "accuracy, step 3: 0.8" in page.words
    assert "runtime" not in page.text


def test_a_curve_of_one_point_is_a_number() -> None:
    page = Page(report_page(made(), {"": [{"step": 7, "loss": 0.5, "learning_rate": 1e-4}]}))
    assert page.count("svg") == 0 and page.count("figure") == 2 and "0.5 at step 7" in page.words


def test_a_training_that_logged_nothing_says_how_to_log() -> None:
    page = Page(report_page(made(), {"": [{"step": 7, "train_loss": 0.5}]}))
    assert "Nothing was logged in 7 steps" in page.text and "--logging_steps" in page.text


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_heat_map_for_each_round(rounds) -> None:
    importance = IMPORTANCE | {
        "rounds": [*IMPORTANCE["rounds"], {"scores": [[1.0, 2.0]], "removed": {"0": [1]}}][:rounds]
    }
    page = Page(report_page(made(), None, importance))
    assert page.count("figure") == rounds
    titles = [words for words in page.words if words.startswith("layer ") and "head" in words]
    assert len(titles) == (5, 7)[rounds - 1]  # of six places one has no head
    assert sum(title.endswith(", removed") for title in titles) == (3, 4)[rounds - 1]
    assert ("Round 2: 1 head removed" in page.words) == (rounds == 2)


MARKUP = "</title></style><script>alert(1)</script><b onclick='x'>\"&"


def test_no_text_of_a_run_is_markup() -> None:
    """In every place that holds text: names, labels, paths, settings, logged names."""
    for results in (with_control(), decoder(), predicted_only()):
        history = [{"step": step, "loss": 1.0 / step, f"eval_{MARKUP}": 0.5 * step} for step in (1, 2)]
        importance = IMPORTANCE | {"importance": MARKUP}
        bad = planted(results, lambda word: f"{word}{MARKUP}")
        # A command is words that a shell reads.
        bad["command"] = "python x.py --name '<script>alert(1)</script>'"
        content = report_page(bad, {MARKUP: history}, importance)
        page = Page(content)
        assert not {"script", "b"} & {tag for tag, _ in page.tags}
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert page.count("title") - content.count("<circle") - 5 == 1  # of the window, dots and heads
        assert "--name '<script>alert(1)</script>'" in page.text
        assert page.text.count("<script>alert(1)</script>") > 10


def test_no_folder_of_this_machine_is_shown() -> None:
    folder = "/home/jane/secret place/"
    for results in (with_control(), decoder(), predicted_only()):
        bad = planted(results, lambda word: f"{folder}{word}")
        bad["command"] = f"python '{folder}x.py' --data_dir '{folder}data' '--file={folder}y'"
        history = [{"step": step, f"{folder}eval_x": 0.5} for step in (1, 2)]
        names = {"0", "1", "rounds", "importance", "scores", "removed"}
        importance = planted(IMPORTANCE, lambda word: f"{folder}{word}", names)
        content = report_page(bad, {f"{folder}name": history}, importance)
        assert not re.search("secret|jane|/home", content)
        assert "python x.py" in Page(content).text


def test_the_page_is_made_again_from_the_folder(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "results.json").write_text(json.dumps(made()))
    for number in (1, 2, 10):
        (tmp_path / f"trainer_state_{number}.json").write_text(json.dumps({"log_history": HISTORY}))
    (tmp_path / "head_importance.json").write_text(json.dumps(IMPORTANCE))
    (tmp_path / "control_state.json").write_text(json.dumps({"log_history": HISTORY}))
    content = write_report(tmp_path).read_text(encoding="utf-8")
    assert [name for name in headings(content) if name.startswith("Training")] == [
        "Training, 1 of 3", "Training, 2 of 3", "Training, 3 of 3", "Training of the control",
    ]  # fmt: skip
    assert "Head importance" in headings(content)
    (tmp_path / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["page.py", str(tmp_path)])
    page_module.main()
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == content
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_a_folder_without_results_is_named_and_left(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["page.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        page_module.main()
    assert stopped.value.code == 1 and str(tmp_path) in capsys.readouterr().err and not list(tmp_path.iterdir())
