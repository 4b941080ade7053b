"""Heat maps of head importance: colours by rank, hover titles, crosses, and the same drawing as a PNG."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.html_page import Page

from hf_attnkit.experiment.report.heat_map import draw_importance, importance_svg, ranks

SCORES = np.array([[0.5, np.nan, 0.1], [0.2, 0.3, 900.0]])


def colours(svg: str) -> dict[str, str]:
    """Hover title -> colour of the cell."""
    cells = re.findall(r'style="fill: (#\w{6})"[^>]*><title>([^<]*)</title>', svg)
    return {title: colour for colour, title in cells}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[0.5, np.nan, 0.1], [0.2, 0.3, 900.0]], [[0.75, np.nan, 0.0], [0.25, 0.5, 1.0]]),
        ([[1.0, 1.0], [2.0, 3.0]], [[1 / 6, 1 / 6], [2 / 3, 1.0]]),  # the two lowest share places 0 and 1 of 3
        ([[7.0, 7.0]], [[0.5, 0.5]]),
        ([[7.0]], [[0.5]]),
        ([[np.nan, np.inf]], [[np.nan, np.nan]]),
    ],
)
def test_ranks(scores, expected) -> None:
    np.testing.assert_allclose(ranks(np.array(scores)), expected)


def test_an_outlier_does_not_decide_the_colours() -> None:
    """The colours depend on the order alone."""
    near = np.where(SCORES == 900.0, 0.6, SCORES)
    far = colours(importance_svg(SCORES, {}, "x"))
    assert list(far.values()) == list(colours(importance_svg(near, {}, "x")).values())
    assert len(set(far.values())) == 5
    assert far["layer 1, head 2: 900"] == "#fde725"  # the end of the scale


def test_each_head_says_its_score_and_whether_it_is_removed() -> None:
    svg = importance_svg(SCORES, {0: [2], 1: [0, 1]}, "three removed <&>")
    assert list(colours(svg)) == [
        "layer 0, head 0: 0.5", "layer 0, head 2: 0.1, removed", "layer 1, head 0: 0.2, removed",
        "layer 1, head 1: 0.3, removed", "layer 1, head 2: 900",
    ]  # fmt: skip
    # A cross is a dark one and a white one on it.
    assert svg.count("<use") == importance_svg(SCORES, {}, "x").count("<use") + 2 * 3
    assert dict(Page(svg).tags[0][1])["aria-label"] == "three removed <&>"


def test_the_legend_names_the_quartiles() -> None:
    words = Page(importance_svg(SCORES, {}, "x")).words
    assert [word for word in ("0.1", "0.2", "0.3", "0.5", "900") if word in words] == [
        "0.1",
        "0.2",
        "0.3",
        "0.5",
        "900",
    ]
    assert any("by rank" in word for word in words) and any("higher = keep" in word for word in words)


def test_the_same_scores_give_the_same_picture() -> None:
    assert importance_svg(SCORES, {0: [2]}, "x") == importance_svg(SCORES, {0: [2]}, "x")


def test_text_has_no_colour_or_font_of_its_own() -> None:
    texts = [attributes for tag, attributes in Page(importance_svg(SCORES, {}, "x")).tags if tag == "text"]
    assert texts and not any({"style", "fill", "font"} & attributes.keys() for attributes in texts)


@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (48, 4)])
def test_sizes(shape) -> None:
    scores = np.arange(shape[0] * shape[1], dtype=float).reshape(shape)
    assert len(colours(importance_svg(scores, {}, "x"))) == scores.size


def test_the_png(tmp_path) -> None:
    scores = torch.from_numpy(SCORES)
    maps = {"entropy": (scores, {0: [2]}), "random": (scores.flip(0), {})}
    draw_importance(maps, tmp_path / "new" / "heads.png", "two scores")
    assert (tmp_path / "new" / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["heads.png"]
