"""Words say what happened and nothing else."""

from __future__ import annotations

import pytest
from support.results import PRUNED, decoder, made, measured_only, predicted_only, with_control

from hf_attnkit.experiment.report.summary import (
    change_facts,
    command_lines,
    comparison,
    flag,
    happened,
    settings,
    title,
)


def test_the_title_says_what_was_done() -> None:
    assert title(made()) == "MiniLM, half of the attention heads removed, CoLA"
    assert title(measured_only()) == "MiniLM, measured on CoLA"
    assert title(predicted_only()) == "MiniLM, predictions on CoLA"
    assert title(made(change=None)) == "MiniLM, trained on CoLA"


def test_what_happened_is_what_actions_say() -> None:
    found = happened(made())
    assert found["training"] == "8,551 examples, split train"
    assert found["measurement"] == "1,043 examples, split validation" and "predictions" not in found
    found = happened(measured_only())
    assert found["training"] == "none in this run" and found["change"] == "none"
    found = happened(predicted_only())
    assert found["measurement"] == found["training"] == "none in this run"
    assert found["predictions"] == "predictions/CoLA.tsv"


@pytest.mark.parametrize(
    ("different", "words"),
    [
        ({}, "CoLA, a task of GLUE (nyu-mll/glue, configuration cola)"),
        ({"hub_path": "local"}, "CoLA, a task of GLUE (local files)"),
        (
            {"name": "demo", "hub_path": "demo", "is_benchmark": False},
            "demo data (sentences that hf_attnkit makes, not GLUE)",
        ),
        ({"name": "reviews", "hub_path": "a/b", "config": None, "is_benchmark": False}, "reviews (a/b)"),
    ],
)
def test_the_data_is_said_to_be_what_it_is(different, words) -> None:
    assert happened(made(data=PRUNED["data"] | different))["data"] == words


def test_a_part_of_the_data_is_said_to_be_one() -> None:
    data = PRUNED["data"] | {"evaluation_examples": 100, "note": "a part of the dev set, 100 of 1,043"}
    found = happened(made(data=data))
    assert found["measurement"] == "100 examples, split validation, a part of the dev set, 100 of 1,043"
    assert "part" not in found["training"]


def test_a_recovery_without_a_control_says_that_the_comparison_is_missing() -> None:
    assert "is missing" in comparison(made()) and "--control" in comparison(made())
    assert comparison(measured_only()) == comparison(predicted_only()) == ""
    assert comparison(made(stages=PRUNED["stages"][:2])) == ""  # nothing was recovered


def test_the_control_is_compared_with_the_recovered_model() -> None:
    text = comparison(with_control())
    assert "matthews_correlation 0.6000" in text and "-0.1500" in text and "75.0% of the control" in text
    assert "missing" not in text


def test_settings_are_what_the_schema_does_not_name() -> None:
    assert settings(made()) == {"importance": "entropy", "importance_options": "direction: focused"}
    assert settings(predicted_only()) == settings(made())
    assert change_facts(made()) == {"heads_removed": "36"} and change_facts(measured_only()) == {}
    assert change_facts(decoder()) == {"method": "pca"}
    assert settings(made(attention=["flash", "flash", "linear"]))["attention"] == "2 x flash, linear"
    assert flag(made(lora=True), "lora") and not flag(made(lora="yes"), "lora") and not flag(made(), "lora")


def test_commands_have_a_line_for_each_flag() -> None:
    assert command_lines("python x.py --a 1 2 --b 'c d'") == "python x.py \\\n    --a 1 2 \\\n    --b 'c d'"
