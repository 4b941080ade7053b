"""The page of `attention_view`: its numbers, its size, and that what users bring is text."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import batch, build
from support.page_data import STEPS, PageData
from support.swapping import swapped
from transformers import BertConfig, BertModel

from hf_attnkit import attention_view, prune_heads
from hf_attnkit.analysis.view import collect

ATTACK = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">&amp;@DATA@"


def bound(p: Any) -> Any:
    """Of a byte that says 1 + round(254 sqrt(p)): the root is off by at most half a step."""
    half = 0.5 / STEPS
    return 2 * np.sqrt(p) * half + half**2 + 1e-7


@pytest.fixture(scope="module")
def compared() -> Any:
    model = build("llama", "base", 8, 2)
    changed = prune_heads(build("llama", "base", 8, 2), {0: [0, 1, 2, 3]})
    inputs = batch(model, (13, 7))
    return attention_view(
        model, inputs, compare=swapped(changed, "sliding_window", window=5), importance=torch.rand(2, 8)
    )


def test_weights_of_the_page_are_those_of_the_view(compared: Any) -> None:
    page = PageData(compared.html)
    assert len(page.data["examples"]) == 2
    for number, example in enumerate(page.data["examples"]):
        for side, of_view in enumerate((compared.examples[number], compared.compared[number])):
            for entry, found in zip(example["maps"][side], of_view.maps, strict=True):
                shape = entry["heads"], entry["rows"], entry["columns"]
                p = found.weights.double().numpy()
                assert p.shape == shape
                assert (np.abs(page.weights(entry["at"], *shape) - p) <= bound(p)).all()
                hidden = page.quantized(entry["at"], *shape) == 0
                assert (hidden == ~found.visible.expand(shape).numpy()).all() and hidden.any()
                np.testing.assert_allclose(entry["entropy"], found.entropy, rtol=1e-4)
        for entry, found in zip(example["differences"], compared.differences[number], strict=True):
            rows = page.weights(entry["rows"], *found.by_query.shape)
            known = ~found.by_query.isnan().numpy()
            assert (np.abs(rows - found.by_query.numpy())[known] <= bound(found.by_query.numpy()[known])).all()
            assert entry["matched"] == list(found.matched)
            assert [x is None for x in entry["total"]] == found.total.isnan().tolist()
        for entry, of in zip(example["attributions"]["rollout"], compared.rollout(number), strict=True):
            found = page.weights(entry["at"], *of.shares.shape)
            assert (np.abs(found - of.shares.numpy()) <= bound(of.shares.numpy())).all()
        (flow,) = example["attributions"]["flow"]
        assert flow["token"] == entry["rows"] - 1  # a causal model answers at its last token
        (of,) = compared.attention_flow(flow["token"], example=number)
        found = page.weights(flow["at"], *of.flows.shape)
        assert (np.abs(found - of.flows.numpy()) <= bound(of.flows.numpy())).all()
    assert page.data["importance"][1][7] == pytest.approx(float(compared.importance[1, 7]), rel=1e-4)


def test_links_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "POOLED_UNITS", 4)
    model = build("llama")
    view = attention_view(model, batch(model, (13,)), exact_tokens=6)
    page = PageData(view.html)
    entry, links = page.data["examples"][0]["maps"][0][0]["links"], view.examples[0].maps[0].links
    assert links is not None
    shape = tuple(links.keys.shape)
    assert (8, entry["queries"], entry["of_each"]) == shape
    assert (page.integers(entry["keys"], *shape) == links.keys.numpy()).all()
    p = links.weights.double().numpy()
    assert (np.abs(page.weights(entry["weights"], *shape) - p) <= bound(p)).all()


class _Tags(HTMLParser):
    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images = 0
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)


class Malicious:
    """A tokenizer whose tokens are markup."""

    def decode(self, ids: list[int]) -> str:
        return f"{ids[0]}{ATTACK}"


def test_what_users_bring_is_text(compared: Any) -> None:
    model = build("bert")
    inputs = batch(model, (5,))
    view = attention_view(model, inputs, Malicious(), compare=build("bert"), names=(ATTACK, ATTACK), title=ATTACK)
    view = dataclasses.replace(view, notes=(ATTACK,))
    plain, found = _Tags(compared.html), _Tags(view.html)
    assert found.tags == plain.tags  # no element more, whatever the text
    assert found.images == plain.images == 0
    data = PageData(view.html).data
    assert data["title"] == ATTACK and data["names"] == [ATTACK, ATTACK] and data["notes"] == [ATTACK]
    assert all(label.endswith(ATTACK) for label in data["examples"][0]["sequences"][0]["labels"])
    assert view._repr_html_().count("<") == 2  # the frame's own tags


def test_a_page_needs_no_network_and_says_nothing_of_the_machine(compared: Any, tmp_path: Path) -> None:
    path = compared.save(tmp_path / "page.html")
    html = path.read_text(encoding="utf-8")
    assert html == compared.html
    assert "default-src 'none'" in html
    for word in ("http://", "https://", "@TITLE@", str(Path.home()), str(tmp_path)):
        assert word not in html
    assert compared._repr_html_().startswith("<iframe sandbox=")


def test_the_size_of_a_page() -> None:
    """72 heads at 128 tokens, as MiniLM: at most 2 MB, also where attention is near uniform and packs badly."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=96, num_hidden_layers=6, num_attention_heads=12,
                        intermediate_size=96, max_position_embeddings=128, initializer_range=0.3)  # fmt: skip
    view = attention_view(BertModel(config).eval(), {"input_ids": torch.randint(1, 99, (1, 128))})
    assert view.examples[0].is_exact
    assert len(view.html) <= 2_000_000
    # A maximum flow for each of 128 tokens takes longer than looking: the page says so.
    attributions = PageData(view.html).data["examples"][0]["attributions"]
    assert not attributions["flow"] and "128 units" in attributions["flow_why"]
    assert math.isclose(len(attributions["rollout"]), 1)
