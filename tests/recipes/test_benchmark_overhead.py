"""The benchmark of a recipe's training step: its ratios from made-up times, and a small run."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from benchmarks import overhead as command
from support.models import build

from hf_attnkit.experiment.benchmarking import overhead
from hf_attnkit.experiment.benchmarking.overhead import DEFAULT, PLAIN, WITHOUT, summary
from hf_attnkit.experiment.benchmarking.proving import ratios
from hf_attnkit.experiment.training import train


def test_overheads_are_those_of_made_up_times() -> None:
    found = {
        PLAIN: [[1.0] * 100, [2.0] * 100],
        WITHOUT: [[1.0] * 100, [2.0] * 100],
        DEFAULT: [[1.01] * 99 + [2.0], [2.02] * 99 + [4.0]],
    }
    report = summary(found, [1.5, 1.5])
    rows = report["rows"]
    assert rows[WITHOUT]["ratio"] == 1.0
    assert rows[DEFAULT]["ratio_quartiles"] == pytest.approx([1.01, 1.01])
    step = rows[DEFAULT]["step_seconds"]
    assert report["entropy_overhead"] == pytest.approx(1.5 / (100 * step))
    assert report["overhead"] == pytest.approx(rows[DEFAULT]["ratio"] - 1 + 0.015 / step)


@pytest.mark.slow
def test_it_runs_each_kind_and_times_every_step_but_the_first(tmp_path, monkeypatch, capsys) -> None:
    for module in (train, overhead, command):
        monkeypatch.setattr(module, "ENTROPY_EVERY_N_STEPS", 2)
    monkeypatch.setattr(command, "STEPS", 3)
    sizes = ("--rounds", "2", "--steps", "4", "--layers", "1", "--hidden_size", "16", "--heads", "2", "--length", "8")
    monkeypatch.setattr(
        sys, "argv", ["x", *sizes, "--batch_size", "1", "--output_file", str(tmp_path / "overhead.json")]
    )
    command.main()
    saved = json.loads((tmp_path / "overhead.json").read_text())
    assert {kind: [len(turn) for turn in turns] for kind, turns in saved["seconds"].items()} == {
        PLAIN: [3, 3], WITHOUT: [3, 3], DEFAULT: [3, 3],
    }  # fmt: skip
    assert saved["measurement_seconds"] > 0 and "of plain" in capsys.readouterr().out
    assert torch.tensor(saved["seconds"][PLAIN]).min() > 0
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "2"])
    with pytest.raises(SystemExit):
        command.main()


def test_changes_are_measured_next_to_forward_passes(tmp_path, monkeypatch, capsys) -> None:
    build("bert", "sequence").save_pretrained(tmp_path / "bert")
    arguments = ["x", "--changes", "--model_name_or_path", str(tmp_path / "bert"), "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output_file", str(tmp_path / "changes.json")])
    command.main()
    saved = json.loads((tmp_path / "changes.json").read_text())
    rows = {row["what"]: row for row in saved["rows"]}
    assert list(rows) == [
        "20 forward passes of 16 tokens", "discovery", "what belongs to a head", "swap to flash", "pruning",
        "conversion (mean)",
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
    assert all(row["peak_bytes"] >= 0 for row in rows.values()) and rows["conversion (mean)"]["peak_bytes"] > 0
    assert ratios(saved["rows"])["20 forward passes of 16 tokens"] == (1.0, 1.0, 1.0)
    assert "gradients of one layer" in capsys.readouterr().out
