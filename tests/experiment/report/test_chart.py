"""Charts of training: what is drawn where, and when a number is enough."""

from __future__ import annotations

import math

import pytest

from hf_attnkit.experiment.report.chart import BOTTOM, DOTS, LEFT, RIGHT, TOP, Line, line_chart, number
from hf_attnkit.experiment.report.training_charts import curves, entropies


def test_points_are_where_the_axes_say() -> None:
    chart = line_chart("Loss", "loss", [Line("training", [(0, 1.0), (10, 2.0)])])
    dots = chart.lines[0].dots
    places = {tick.text: tick.place for tick in chart.y_ticks}
    assert (dots[0].x, dots[1].x) == (LEFT, RIGHT) and (dots[0].y, dots[1].y) == (places["1"], places["2"])
    assert all(TOP <= tick.place <= BOTTOM for tick in chart.y_ticks)
    assert [tick.place for tick in chart.x_ticks if tick.text == "10"] == [RIGHT]
    assert dots[1].text == "training, step 10: 2" and not chart.lines[0].in_legend  # the title names it


def test_a_point_is_a_number() -> None:
    chart = line_chart("Loss", "loss", [Line("training", [(4, 0.123456789)]), Line("evaluation", [(4, -2.0)])])
    assert chart.lines == [] and chart.numbers == {
        "training": "0.123457 at step 4", "evaluation": "\N{MINUS SIGN}2 at step 4",
    }  # fmt: skip
    both = line_chart("Loss", "loss", [Line("training", [(1, 2.0), (4, 1.0)]), Line("evaluation", [(4, 2.0)])])
    assert [len(line.dots) for line in both.lines] == [2, 1] and both.numbers == {}


def test_what_is_not_finite_is_not_drawn() -> None:
    chart = line_chart("Loss", "loss", [Line("training", [(1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf)])])
    assert [dot.text for dot in chart.lines[0].dots] == ["training, step 1: 2", "training, step 3: 1"]
    nothing = line_chart("Loss", "loss", [Line("training", [(1, math.nan)])])
    assert nothing.lines == [] and nothing.numbers == {}


def test_a_long_line_has_few_dots() -> None:
    chart = line_chart("Loss", "loss", [Line("training", [(step, 1.0 / (step + 1)) for step in range(1000)])])
    assert len(chart.lines[0].dots) <= DOTS and chart.lines[0].path.count("L") == 999


def test_the_legend_of_many_layers_names_some() -> None:
    history = [{f"attention_entropy/layer_{layer}/{kind}": 0.1, "step": step}
               for layer in range(40) for kind in ("mean", "min") for step in (1, 2)]  # fmt: skip
    for chart in entropies(history):
        assert len(chart.lines) == 40
        named = [line.name for line in chart.lines if line.in_legend]
        assert len(named) == 6 and named[0] == "layer 0" and named[-1] == "layer 39"


def test_layers_are_in_order_and_speeds_no_curves() -> None:
    history = [{"step": step, "attention_entropy/layer_10/mean": 0.2, "attention_entropy/layer_2/mean": 0.1,
                "eval_runtime": 1.0, "eval_samples_per_second": 2.0} for step in (1, 2)]  # fmt: skip
    (chart,) = entropies(history)
    assert [line.name for line in chart.lines] == ["layer 2", "layer 10"] and curves(history) == []


@pytest.mark.parametrize(("value", "text"), [(12345.6, "12,346"), (0.1 + 0.2, "0.3"), (1e-5, "1e\N{MINUS SIGN}5")])
def test_numbers_are_short(value, text) -> None:
    assert number(value) == text
