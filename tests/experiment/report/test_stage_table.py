"""The table of stages: differences to the first, the share of the control, times as ratios."""

from __future__ import annotations

import copy

import pytest
from support.results import BASELINE, CHANGED, CONTROL, CUT, RECOVERED, decoder, made, stage, stage_time, with_control

from hf_attnkit.experiment.report.stage_table import heads, label, model_name, notes, stage_table


def table(results: dict, **options: bool) -> dict[str, list[str]]:
    """Columns by name."""
    header, rows = stage_table(results["stages"], results["timing"], results["control"], **options)
    return {name: [str(row[place]) for row in rows] for place, name in enumerate(header)}


def test_differences_are_to_the_first_stage() -> None:
    found = table(made())
    assert found["matthews_correlation"] == ["0.5000", "0.3000 (-0.2000)", "0.4500 (-0.0500)"]
    assert found["parameters"] == ["72,000", "36,000 (-50.0%)", "36,000 (-50.0%)"]
    assert found["heads"] == ["6 x 12", "8 5 7 6 4 6", "8 5 7 6 4 6"]


def test_an_encoder_has_no_cache_and_heads_of_their_own_no_column() -> None:
    assert list(table(made())) == ["stage", "matthews_correlation", "accuracy", "heads", "parameters", "time ratio"]


def test_a_decoder_has_a_cache() -> None:
    found = table(decoder())
    assert found["KV bytes/token"] == ["9,216", "2,304 (-75.0%)", "2,304 (-75.0%)"]
    assert found["key/value heads"] == ["2 x 4", "2 x 1", "2 x 1"]
    assert "Perplexity: lower is better." in notes(decoder()["stages"]) and "lower" not in " ".join(
        notes(made()["stages"])
    )


def test_the_share_of_the_control() -> None:
    shares = [f"{value / CONTROL:.1%}" for value in (BASELINE, CHANGED, RECOVERED, CONTROL)]
    assert table(with_control())["share of control"] == shares == ["83.3%", "50.0%", "75.0%", "100.0%"]


@pytest.mark.parametrize(("control", "recovered"), [(0.0, 0.5), (-0.1, 0.5), (float("nan"), 0.5), (0.5, -0.1)])
def test_there_is_no_share_of_or_as_a_number_that_is_not_above_zero(control, recovered) -> None:
    results = with_control()
    results["stages"][2]["metrics"]["matthews_correlation"] = recovered
    results["stages"][3]["metrics"]["matthews_correlation"] = control
    assert table(results).get("share of control", [""] * 4)[2] == ""


def test_times_are_ratios_with_quartiles() -> None:
    assert table(made())["time ratio"] == ["1", "0.830 (0.820 to 0.840)", "0.840 (0.830 to 0.850)"]
    (note,) = [note for note in notes(made()["stages"], made()["timing"]) if note.startswith("Time ratio")]
    assert "alternately" in note and "31 repeats" in note and "32 x 64 tokens" in note and "412.0 ms" in note


def test_times_of_rounds_are_those_of_their_rounds() -> None:
    results = made()
    results["stages"] = [stage("baseline", 0.5), *(stage(name, 0.4, CUT, round=n) for n in (1, 2)
                                                   for name in ("changed", "recovered"))]  # fmt: skip
    times = [("baseline", 1.0), ("changed, round 1", 0.9), ("recovered, round 1", 0.8), ("changed, round 2", 0.7)]
    results["timing"]["stages"] = [stage_time(*time, 0.0) for time in times]
    found = table(results)["time ratio"]
    assert [text.split()[0] if text else "" for text in found] == ["1", "0.900", "0.800", "0.700", ""]
    # Named by the stage alone, in the order of the stages.
    results["timing"]["stages"] = [stage_time(name.partition(",")[0], ratio, 0.0) for name, ratio in times]
    assert table(results)["time ratio"] == found


def test_seconds_are_not_in_the_table_and_memory_where_there_is_room() -> None:
    assert not any("77.7" in cell for cells in table(made(), memory=True).values() for cell in cells)
    assert table(made(), memory=True)["peak MiB"] == ["900"] * 3 and "peak MiB" not in table(made())


def test_without_stages_there_is_no_table() -> None:
    assert stage_table([]) == ([], []) and notes([]) == []


def test_numbers_that_are_none_and_metrics_that_are_missing() -> None:
    results = copy.deepcopy(made())
    results["stages"][0]["metrics"]["accuracy"] = float("nan")
    del results["stages"][2]["metrics"]["accuracy"]
    assert table(results)["accuracy"] == ["nan", "0.8000", ""]


def test_labels_tell_stages_apart() -> None:
    assert label({"stage": "changed"}) == "changed"
    assert label({"stage": "changed", "round": 2}) == "changed, round 2"
    assert label({"stage": "changed", "variant": "pca", "refit": "output"}) == "changed, pca, refit output"


def test_heads_of_layers() -> None:
    assert heads([12, 12, 12]) == "3 x 12" and heads([12, 0, 3]) == "12 0 3"


def test_a_model_is_called_by_what_tells_it_from_others() -> None:
    assert model_name("bert-base-uncased") == "bert-base-uncased" and model_name("outputs/cola") == "cola"
    assert model_name("/x/outputs/gqa/cola/seed-0") == "gqa-cola-seed-0" and model_name("seed-0") == "seed-0"
