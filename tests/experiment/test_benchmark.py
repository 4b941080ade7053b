"""The benchmark: what it compares computes the same, what it measures is exact, what it writes is whole.

No test looks at a time: those belong to a quiet machine.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from benchmarks import attention as benchmark_attention
from support import linear
from support.accuracy import assert_as_accurate
from support.reference import Text, attend, everything, window, window_and_global
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from hf_attnkit.attention.kernels.feature_maps import FEATURE_MAPS
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.experiment.benchmarking import candidates as benchmark_candidates
from hf_attnkit.experiment.benchmarking.arguments import BenchmarkArguments, check
from hf_attnkit.experiment.benchmarking.candidates import (
    PARTS,
    Problem,
    candidates,
    forms_of_linear,
    make_call,
    make_inputs,
    usual,
)
from hf_attnkit.experiment.benchmarking.measure import peak_bytes, quartiles, time_alternately
from hf_attnkit.experiment.benchmarking.quantities import Bar, Side, bars, measure_bars, samples

CPU = torch.device("cpu")
WINDOW = 5
WITHOUT_FLEX = [label for label in candidates(WINDOW) if not label.startswith("flex")]
FORMS = list(forms_of_linear(WINDOW))
SMALL = Problem(23, batch_size=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, window=WINDOW)
PATTERNS = {
    "local_global": partial(window_and_global, WINDOW, 1),
    "window": partial(window, WINDOW),
}


def expected(label: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """What a candidate must compute, from the definition: in float64, and in the problem's precision."""
    row = candidates(WINDOW)[label]
    inputs = make_inputs(problem, 1 if row.one_key_value_head else problem.num_key_value_heads)
    if label in FORMS:
        scaling = problem.head_dim**-0.5
        mask = Mask.aligned(problem.queries, problem.length, is_causal=True)
        made = LinearAttention(**row.options).create_parameters(4, 2, problem.head_dim)
        learned = [] if made is None else [parameter.detach() for parameter in made.parameters()]
        exact, plain = (
            linear.expected(row.options, mask, *(x.to(dtype) for x in (*inputs, *learned)), scaling=scaling)
            for dtype in (torch.float64, torch.float32)
        )
        return exact, plain
    i = torch.arange(problem.length - problem.queries, problem.length)[None, :, None]
    j, first = torch.arange(problem.length)[None, None], torch.zeros(1, 1, 1)
    text = Text(i, j, first, first + problem.length - 1, True)
    seen = (PATTERNS.get(row.computes, everything)(text) & (j <= i))[:, None]
    options = {"scaling": problem.head_dim**-0.5, "softmax": row.computes != "linear"}
    return attend(*(x.double() for x in inputs), seen, **options), attend(*inputs, seen, **options)


@pytest.mark.parametrize("label", [label for label in WITHOUT_FLEX if label not in ("sdpa_cudnn", "sdpa_flash")])
@pytest.mark.parametrize("part", ["forward", "decode"])
def test_each_candidate_computes_what_it_stands_for(label: str, part: str) -> None:
    problem = replace(SMALL, is_decode=part == "decode")
    exact, plain = expected(label, problem)
    assert_as_accurate(make_call(candidates(WINDOW)[label], problem, part)(), plain, exact)


@pytest.mark.parametrize("label", FORMS)
def test_a_step_of_linear_attention_reads_what_it_is_said_to_keep(label: str, monkeypatch) -> None:
    """Again and again: the state is of the tokens before this one."""
    taken: list[Tensor] = []
    attention = LinearAttention.attention

    def noting(self: LinearAttention, query: Tensor, key: Tensor, value: Tensor, *others, call, **options):
        kept = [call.cache.sums, key[:, :, :-1], value[:, :, :-1]]
        taken.append(sum(tensor.nbytes if place == 0 else tensor.numel() * 4 for place, tensor in enumerate(kept)))
        return attention(self, query, key, value, *others, call=call, **options)

    monkeypatch.setattr(LinearAttention, "attention", noting)
    for length in (3, 23):
        problem = replace(SMALL, is_decode=True, length=length)
        row = candidates(WINDOW)[label]
        step = make_call(row, problem, "decode")
        assert torch.equal(step(), step())
        assert taken == [row.kept(problem)] * 2
        taken.clear()
    keys = 4 * problem.batch_size * problem.num_key_value_heads * problem.length * problem.head_dim
    assert candidates(WINDOW)["sdpa"].kept(problem) == 2 * keys
    assert candidates(WINDOW)["mqa"].kept(problem) == keys and candidates(WINDOW)["sliding_window"].kept is None


def test_forms_of_linear_attention_are_asked_for_by_name() -> None:
    assert not set(usual()) & set(FORMS) and {*usual(), *FORMS} == set(candidates(WINDOW))
    assert {f"linear_{name}" for name in FEATURE_MAPS} <= set(FORMS)


@pytest.mark.parametrize("label", ["flex_causal", "flex_window"])
@pytest.mark.parametrize("part", ["forward", "decode"])
def test_flex_candidates_compute_what_they_stand_for(label: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Uncompiled it is the same function, without minutes of compilation.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert benchmark_candidates.flex_attention is flex_attention
    problem = replace(SMALL, is_decode=part == "decode")
    exact, plain = expected(label, problem)
    assert_as_accurate(make_call(candidates(WINDOW)[label], problem, part)(), plain, exact)


def test_backward_gives_a_gradient_for_each_input() -> None:
    for label in ("eager", "sdpa", "mqa", "sliding_window"):
        row = candidates(WINDOW)[label]
        shapes = [x.shape for x in make_inputs(SMALL, 1 if row.one_key_value_head else 2)]
        gradients = make_call(row, SMALL, "backward")()
        assert [gradient.shape for gradient in gradients] == shapes
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_what_cannot_run_says_why() -> None:
    rows = candidates(WINDOW)
    assert "--max_quadratic 22" in rows["eager"].obstacle(SMALL, "forward", 22)
    assert rows["eager"].obstacle(SMALL, "forward", 23) is None
    assert rows["eager"].obstacle(SMALL, "decode", 22) is None
    assert "its own key/value head" in rows["sdpa_gqa"].obstacle(replace(SMALL, num_key_value_heads=4), "decode", 99)
    assert rows["sdpa_gqa"].obstacle(SMALL, "decode", 99) is None
    assert "CUDA" in rows["sdpa_flash"].obstacle(SMALL, "forward", 99)
    assert "bfloat16" in rows["sdpa_cudnn"].obstacle(replace(SMALL, device=torch.device("cuda")), "forward", 99)
    assert "no backward" in rows["flex_window"].obstacle(SMALL, "backward", 99)


def test_a_machine_without_a_compiler_leaves_flex_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(torch, "compile", fails)
    benchmark_candidates.flex_failure.cache_clear()
    try:
        reason = candidates(WINDOW)["flex_causal"].obstacle(SMALL, "forward", 99)
    finally:
        benchmark_candidates.flex_failure.cache_clear()
    assert reason == "FlexAttention does not run here: RuntimeError: no C++ compiler"


def test_peak_memory_is_exact() -> None:
    def one_after_the_other() -> None:
        first = torch.empty(250_000)
        del first
        torch.empty(500_000)

    def together() -> list[Tensor]:
        return [torch.empty(250_000), torch.empty(500_000)]

    for _ in range(2):
        assert peak_bytes(one_after_the_other, CPU) == 2_000_000
        assert peak_bytes(together, CPU) == 3_000_000
    assert peak_bytes(lambda: None, CPU) == 0


def test_peak_memory_sees_inside_autograd() -> None:
    leaf = torch.ones(100_000, requires_grad=True)
    # The result of exp, the gradient fed in (expanded, no memory), and the gradient: two at once.
    assert peak_bytes(lambda: torch.autograd.grad(leaf.exp(), leaf, torch.ones(()).expand(100_000)), CPU) == 800_004


def set_clock(monkeypatch: pytest.MonkeyPatch, tick: float) -> None:
    """A sample must last one second, and the clock moves on by `tick` between two looks."""
    looks = iter(range(10_000))
    monkeypatch.setattr("hf_attnkit.experiment.benchmarking.measure.SAMPLE", 1.0)
    monkeypatch.setattr("hf_attnkit.experiment.benchmarking.measure.time.perf_counter", lambda: next(looks) * tick)


def test_rounds_are_interleaved_and_begin_with_another_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 1.0)  # one call makes a sample
    called, stepped = [], []
    calls = {label: lambda label=label: called.append(label) for label in "abc"}
    found = time_alternately(calls, 4, CPU, stepped.append)
    assert "".join(called) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert "".join(stepped) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {label: len(seconds) for label, seconds in found.items()} == {"a": 4, "b": 4, "c": 4}
    assert found["a"] == [1.0] * 4


def test_a_short_call_is_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 1 / 8)
    called = []
    found = time_alternately({"a": lambda: called.append("a")}, 2, CPU)
    assert len(called) == 2 + 2 * 8
    assert found["a"] == [1 / 64] * 2  # the clock gives 1 / 8 for eight calls


def test_quartiles() -> None:
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> None:
    command = ["benchmark_attention.py", "--output_dir", str(output), "--device", "cpu", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_attention.main()


SIZES = ["--lengths", "32", "16", "--num_attention_heads", "4", "--num_key_value_heads", "2", "--head_dim", "8",
         "--window", "4", "--repeats", "2"]  # fmt: skip


@pytest.mark.slow
def test_a_run_writes_all_of_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = [label for label in WITHOUT_FLEX if label not in FORMS[1:]]
    run(monkeypatch, tmp_path, *SIZES, "--max_quadratic", "16", "--markdown", "--implementations", *asked)
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["threads"] == torch.get_num_threads() and results["device"]["type"] == "cpu"
    assert results["versions"]["torch"] == torch.__version__ and results["arguments"]["window"] == 4
    found = {(r["part"], r["length"], r["candidate"]): r for r in results["measurements"]}
    missing = {(r["part"], r["length"], r["candidate"]): r["reason"] for r in results["left_out"]}
    assert found.keys() | missing.keys() == {(p, n, label) for p in PARTS for n in (16, 32) for label in asked}
    assert not found.keys() & missing.keys()
    assert "quadratic" in missing["backward", 32, "mha"] and ("decode", 32, "mha") in found
    for record in found.values():
        assert len(record["seconds"]) == 2 and min(record["seconds"]) > 0
        assert record["quartiles_seconds"][0] <= record["median_seconds"] <= record["quartiles_seconds"][1]
        base = found[record["part"], record["length"], "sdpa"]
        assert record["ratio_to_baseline"] == pytest.approx(record["median_seconds"] / base["median_seconds"])
        # A result is held: as many numbers as the queries have, four bytes each.
        assert record["peak_bytes"] >= 4 * 8 * 4 * (1 if record["part"] == "decode" else record["length"])
    assert found["forward", 16, "sliding_window"]["options"] == {"window": 4}
    assert found["decode", 32, "sdpa"]["kept_bytes"] == 2 * 2 * 32 * 8 * 4  # keys and values of two heads
    assert found["decode", 32, "linear_elu"]["kept_bytes"] == 2 * 8 * 9 * 4  # a state of one size
    assert found["forward", 32, "sdpa"]["kept_bytes"] is None
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    markdown, printed = (tmp_path / "benchmark.md").read_text(), capsys.readouterr().out
    assert "decode step: keys and values or state that a model keeps, in MiB" in markdown
    (row,) = [line for line in markdown.split("**")[2].splitlines() if line.startswith("| mha ")]
    assert row.endswith("| - |") and "x |" in row  # 16 tokens measured, 32 not
    assert "not measured: sdpa_cudnn, sdpa_flash: only on CUDA" in printed and "only on CUDA" in markdown


def test_chosen_rows_parts_and_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("--implementations", "gqa", "--baseline", "eager", "--parts", "decode", "--dtype", "bfloat16")
    run(monkeypatch, tmp_path, *SIZES, *chosen)
    results = json.loads((tmp_path / "benchmark.json").read_text())
    found = [(r["part"], r["length"], r["candidate"]) for r in results["measurements"]]
    assert found == [("decode", n, label) for n in (16, 32) for label in ("eager", "gqa")]
    assert not (tmp_path / "benchmark.md").exists()
    with pytest.raises(ValueError, match=r"finished run \(benchmark.json\)"):
        run(monkeypatch, tmp_path, *SIZES, *chosen)


def test_nothing_left_to_measure_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ("--implementations", "mha", "--baseline", "eager", "--parts", "forward", "--max_quadratic", "0")
    with pytest.raises(ValueError, match=r"nothing can be measured.*eager, mha: memory is quadratic"):
        run(monkeypatch, tmp_path, *SIZES, *only)
    assert not any(tmp_path.iterdir())


def test_quantities_are_measured_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(benchmark_attention, "bars", lambda device: bars(device, unit=32))
    run(monkeypatch, tmp_path, "--quantities", "--repeats", "2", "--markdown")
    records = json.loads((tmp_path / "quantities.json").read_text())["quantities"]
    assert [record["bar"] for record in records] == [
        "at least 5.0", "at most 2.3", "at most 1.05", "at most 1.05", "at most 2.02", "at least 5.0", "at most 4.5",
    ]  # fmt: skip
    for record in records:
        direction, limit = record["bar"].rsplit(" ", 1)
        over, under = ((record.get("seconds") or record["bytes"])[record[side]] for side in ("over", "under"))
        assert record["ratio"] == pytest.approx(quartiles(over)[1] / quartiles(under)[1])
        assert record["is_met"] == (
            record["ratio"] <= float(limit) if direction == "at most" else record["ratio"] >= float(limit)
        )
    assert {path.name for path in tmp_path.iterdir()} == {"quantities.json", "quantities.md"}
    printed, markdown = capsys.readouterr().out, (tmp_path / "quantities.md").read_text()
    assert all(record["what"] in markdown for record in records)
    assert ("MISS" in markdown) == ("MISS" in printed) == any(not record["is_met"] for record in records)


def test_the_bars_have_the_sizes_that_they_are_known_by() -> None:
    chosen = {bar.what: bar for bar in bars(CPU)}
    assert list(chosen) == [
        "SDPA with the dense mask over sliding_window: 8,192 tokens, window 256, forward + backward",
        "sliding_window, 16,384 over 8,192 tokens, window 256, forward + backward",
        "flash over SDPA, causal, 4,096 tokens, forward",
        "flash over SDPA, causal, 4,096 tokens, forward + backward",
        "peak memory of flash_tiled, 16,384 over 8,192 tokens, forward + backward",
        "repeat_kv and SDPA over gqa: decode step, 32 over 8 heads, 8,192 cached tokens",
        "linear, causal, 16,384 over 4,096 tokens, forward",
    ]
    sides = [side for bar in chosen.values() for side in (bar.over, *bar.under)]
    assert all(side.problem.dtype == torch.float32 and side.problem.window == 256 for side in sides)
    for bar in chosen.values():  # each side has the length that the text gives it
        assert all(f"{side.problem.length:,}" in bar.what for side in (bar.over, *bar.under))


def test_the_fastest_of_several_rivals_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"flash 23": [6.0, 9.0, 6.0], "sdpa 23": [2.0, 3.0, 4.0], "eager 23": [5.0, 1.0, 2.0]}
    monkeypatch.setattr(
        "hf_attnkit.experiment.benchmarking.quantities.time_alternately",
        lambda calls, *_: {name: raw[name] for name in calls},
    )
    sides = [Side(label, "forward", SMALL) for label in ("flash", "sdpa", "eager")]
    bar = Bar("what", sides[0], tuple(sides[1:]), ("at most", 3.0))
    (record,) = measure_bars([bar], 3)
    assert (record["under"], record["ratio"], record["is_met"]) == ("eager 23", 3.0, True)
    assert record["ratio_quartiles"] == list(quartiles([6 / 5, 9.0, 3.0])[::2])
    (record,) = measure_bars([replace(bar, limit=None)], 3)
    assert record["bar"] is None and record["is_met"] is None


def test_on_cuda_the_fastest_kernels_are_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_attnkit.experiment.benchmarking.quantities.flex_failure", lambda device: None)
    cuda = bars(torch.device("cuda"))[len(bars(CPU)) :]
    flash = [bar for bar in cuda if bar.over.label == "flash"]
    assert [bar.over.problem.length for bar in flash] == [1024, 2048, 4096, 8192, 16384, 32768] * 2
    assert {side.label for bar in flash for side in bar.under} == {"sdpa_cudnn", "sdpa_flash", "flex_causal"}
    windows = [bar for bar in cuda if bar.over.label == "sliding_window"]
    assert len(windows) == 12 and all(bar.under[0].label == "flex_window" for bar in windows)
    assert cuda[-1].over.label == "copy" and cuda[-1].under[0].label == "gqa"
    assert all(a.problem == b.problem for bar in cuda for a, b in pairwise((bar.over, *bar.under)))
    assert all(bar.over.problem.dtype == torch.bfloat16 for bar in cuda)


def test_a_copy_moves_what_a_decode_step_reads() -> None:
    problem = replace(SMALL, is_decode=True)
    bar = Bar("share", Side("copy", "decode", problem), (Side("gqa", "decode", problem),), None, "bytes")
    (record,) = measure_bars([bar], 1)
    keys = 4 * problem.batch_size * problem.num_key_value_heads * problem.length * problem.head_dim
    assert record["bytes"]["copy 23"] == [keys]  # written, after as many read: together keys and values
    assert samples([bar], 3) == 2


WRONG = [
    ({"implementations": ["sdpa", "flahs"]}, "--implementations flahs is unknown.*flash"),
    ({"baseline": "spda"}, "--baseline spda is unknown.*sdpa"),
    ({"parts": ["forward", "generate"]}, "--parts generate is unknown.*decode"),
    ({"dtype": "int8"}, "--dtype int8 is unknown.*bfloat16"),
    ({"lengths": [16, 0]}, "--lengths 0 must be at least 1"),
    ({"num_attention_heads": 0}, "--num_attention_heads 0"),
    ({"num_key_value_heads": -1}, "--num_key_value_heads -1"),
    ({"num_key_value_heads": 3}, "--num_key_value_heads 3 must divide --num_attention_heads 8"),
    ({"head_dim": 0}, "--head_dim 0"),
    ({"window": 0}, "--window 0"),
    ({"batch_size": 0}, "--batch_size 0"),
    ({"repeats": 0}, "--repeats 0"),
    ({"max_quadratic": -1}, "--max_quadratic -1 must be at least 0"),
    ({"device": "tpu"}, "--device tpu must be cpu, cuda"),
    ({"device": "cuda:x"}, "--device cuda:x must be cpu, cuda"),
    ({"device": "cuda:99"}, "--device cuda:99 is not there.*use --device cpu"),
    ({"quantities": True, "lengths": [512]}, r"--lengths \[512\] has no effect with --quantities"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_wrong_value_is_named_with_the_remedy(wrong: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check(BenchmarkArguments(output_dir=str(tmp_path), **wrong))


def test_defaults_are_accepted(tmp_path: Path) -> None:
    assert check(BenchmarkArguments(output_dir=str(tmp_path), device="cpu")) == CPU
    assert check(BenchmarkArguments(output_dir=str(tmp_path), device="cpu", quantities=True)) == CPU
    either = check(BenchmarkArguments(output_dir=str(tmp_path)))
    assert either == (torch.device("cuda", 0) if torch.cuda.is_available() else CPU)
