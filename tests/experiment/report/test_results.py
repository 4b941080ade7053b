"""Reading results.json: what is refused, and that no folder of this machine gets through."""

from __future__ import annotations

import json

import pytest
from support.results import PRUNED, made

from hf_attnkit.experiment.report.results import public, read_results, without_folders


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/jane/models/cola", "cola"),
        ("/home/Jane Doe/my models/cola/", "cola"),
        ("~/models/cola", "cola"),
        ("file:///home/jane/cola", "cola"),
        (r"C:\Users\jane\cola", "cola"),
        ("C:/Users/jane/cola", "cola"),
        (r"\\server\share\cola", "cola"),
        ("the folder (/home/jane/cola), and /data/x.", "the folder (cola), and x."),
        ("CACHE=/home/jane/cache '/home/jane/a'", "CACHE=cache 'a'"),
        ("at file:/home/jane/cola here", "at cola here"),
        ("in C:\\Users\\jane\\cola now", "in cola now"),
        ("/tmp/.cache/x", "x"),
    ],
)
def test_of_an_absolute_path_the_last_component_is_left(given, shown) -> None:
    assert without_folders(given) == shown
    assert without_folders({given: [given, (given,)]}) == {shown: [shown, [shown]]}


@pytest.mark.parametrize(
    "text",
    ["nyu-mll/glue", "outputs/cola/seed-0", "./outputs/cola", "../models/cola", "KV bytes/token", "1/2", "and/or", "/",
     "https://example.org/a/b", "see https://example.org/a", "</b>", "", "key/value heads", "heads / layer", "3 +/- 1"],
)  # fmt: skip
def test_what_is_no_absolute_path_stays(text) -> None:
    assert without_folders(text) == text


def test_numbers_and_nothing_stay() -> None:
    assert without_folders({"a": [1, 0.5, True, None]}) == {"a": [1, 0.5, True, None]}


def test_a_path_with_spaces_in_the_command_is_one_word() -> None:
    command = "python x.py --data_dir '/home/Jane Doe/my data' --file='/home/Jane Doe/a b.txt' --out outputs/a"
    assert (
        public(made(command=command))["command"] == "python x.py --data_dir 'my data' '--file=a b.txt' --out outputs/a"
    )


def test_what_results_hold_is_left_as_it_is() -> None:
    before = made()
    assert public(before) == PRUNED and before == PRUNED


def test_results_of_earlier_versions_are_refused_by_name(tmp_path) -> None:
    old = {key: value for key, value in PRUNED.items() if key not in ("change", "actions", "timing", "control")}
    (tmp_path / "results.json").write_text(json.dumps(old | {"model": "outputs/cola", "data": "GLUE dev set"}))
    with pytest.raises(ValueError, match=r"results.json lacks change, actions, timing, control, model, data") as error:
        read_results(tmp_path)
    assert "run the recipe again" in str(error.value)


def test_the_means_of_several_runs_are_refused_with_the_name_of_one(tmp_path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"runs": ["cola/seed-0", "cola/seed-1"], "stages": []}))
    with pytest.raises(ValueError, match="such as cola/seed-0"):
        read_results(tmp_path)


def test_a_folder_without_results_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_results(tmp_path)
