"""The benchmark of the backends: the cases in order, what is left out and why, and the end in time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import backends as benchmark_backends

from hf_attnkit.attention.kernels import backends
from hf_attnkit.experiment.benchmarking.backends import CASES, Problem, Sizes, first_call, measure, problems

SIZES = Sizes(2, 4, 2, 16, 8, torch.device("cpu"))


@pytest.fixture
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._RUN, "flex", backends._packed)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_every_backend_that_can_runs(case: str, part: str, _without_a_compiler: None) -> None:
    record, left_out = measure(Problem(case, 24, torch.float32, part, SIZES), 2, 100)
    assert record is not None
    measured, others = set(record["median_seconds"]), {each["backend"] for each in left_out}
    assert not measured & others and measured | others == set(backends.BACKENDS)
    assert record["auto"] in measured and record["fastest"] in measured
    assert record["auto_to_fastest"] >= 1 and all(len(each) == 2 for each in record["seconds"].values())
    assert ("flex" in measured) is (part == "forward" and case != "bias")


def test_matrices_only_up_to_a_length(_without_a_compiler: None) -> None:
    record, left_out = measure(Problem("causal", 24, torch.float32, "forward", SIZES), 1, 20)
    assert record is not None and "packed" not in record["seconds"]
    assert {"problem": "causal, 24 tokens, float32, forward", "backend": "packed",
            "reason": "memory is quadratic: only up to --max_quadratic 20"} in left_out  # fmt: skip


def test_order_and_failures() -> None:
    found = list(problems(list(CASES), [9, 4], [torch.float32], ["forward", "backward"], SIZES))
    assert found[0].case == "causal" and [each.length for each in found] == sorted(each.length for each in found)
    assert not [each for each in found if each.case == "one query" and each.part == "backward"]

    def fails() -> None:
        raise RuntimeError("out of memory\nand more")

    assert first_call(fails, torch.device("cpu")) == (0.0, "RuntimeError: out of memory")


def test_ends_in_time_and_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], _without_a_compiler: None
) -> None:
    arguments = ["--output_dir", str(tmp_path), "--device", "cpu", "--lengths", "16", "--repeats", "1", "--cases",
                 "causal", "bias", "--parts", "forward", "--flex_lengths"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["backends.py", *arguments])
    benchmark_backends.main()
    results = json.loads((tmp_path / "backends.json").read_text())
    assert [record["case"] for record in results["measurements"]] == ["causal", "bias"]
    assert "first call" in (tmp_path / "backends.md").read_text()
    monkeypatch.setattr(sys, "argv", ["backends.py", *arguments, "--max_seconds", "0"])
    benchmark_backends.main()
    assert "--max_seconds 0 were over" in capsys.readouterr().out
    assert json.loads((tmp_path / "backends.json").read_text())["measurements"] == []
