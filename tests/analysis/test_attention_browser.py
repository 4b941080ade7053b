"""The page of `attention_view` in a real browser: every view is clicked through, and what it says is read back.

Needs Chromium and its driver (Debian: `apt-get install chromium chromium-driver`) and Selenium.
"""

from __future__ import annotations

import copy
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.swapping import swapped

from hf_attnkit import attention_view, prune_heads
from hf_attnkit.analysis.view import collect

pytestmark = pytest.mark.slow
WIDE, NARROW = 1200, 400
DASH = "\N{EN DASH}"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars")  # fmt: skip
ATTACK = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


class Browser:
    """A page that is open."""

    def __init__(self, driver: Any) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.driver, self._css, self.keys = driver, By.CSS_SELECTOR, Keys

    def open(self, path: Path, *, width: int = WIDE, dark: bool = False) -> float:
        """Seconds until it is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        start = time.perf_counter()
        self.driver.get(path.as_uri())
        self.wait("return document.documentElement.dataset.ready")
        return time.perf_counter() - start

    def wait(self, script: str) -> Any:
        end = time.perf_counter() + 10
        while not (found := self.driver.execute_script(script)):
            assert time.perf_counter() < end, (script, self.driver.get_log("browser"))
            time.sleep(0.02)
        return found

    def all(self, css: str) -> list[Any]:
        return list(self.driver.find_elements(self._css, css))

    def one(self, css: str) -> Any:
        return self.driver.find_element(self._css, css)

    def text(self, css: str) -> str:
        return str(self.one(css).text)

    def tab(self, name: str) -> None:
        self.one(f"#tab-{name}").click()

    def hover(self, element: Any) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def choose(self, label: str, option: str) -> None:
        from selenium.webdriver.support.ui import Select

        (found,) = [each for each in self.all("label") if each.text.startswith(label)]
        Select(found.find_element(self._css, "select")).select_by_visible_text(option)

    def focused(self, attribute: str) -> str:
        return str(self.driver.switch_to.active_element.get_attribute(attribute))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed (pip install selenium)")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield Browser(opened)
    opened.quit()


class Tokenizer:
    """Names a token after its number; one is markup."""

    def decode(self, ids: list[int]) -> str:
        return ATTACK if ids[0] == 13 else f" t{ids[0]}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A grouped model, and the same with four heads less and a streaming layer."""
    model = build("llama", "base", 8, 2)
    changed = swapped(model, "streaming_heads", heads=[1], window=3, num_sink_tokens=1, layers=[1])
    changed = prune_heads(changed, {0: [0, 1, 2, 3]})
    inputs = {"input_ids": torch.arange(10, 22).repeat(2, 1)}
    path = tmp_path_factory.mktemp("pages") / "page.html"
    view = attention_view(
        model, inputs, Tokenizer(), compare=changed, path=path, names=("full", "<b>cut</b>"), title=ATTACK,
        importance=torch.arange(16.0).view(2, 8) / 8,
    )  # fmt: skip
    return path, view


def test_the_model_view(browser: Browser, page: tuple[Path, Any]) -> None:
    path, view = page
    browser.open(path)
    assert browser.text("h1") == ATTACK
    assert len(browser.all(".cell canvas")) == 16 and len(browser.all(".cell.grouped")) == 16
    browser.hover(browser.one('[data-map="1"][data-head="5"]'))
    entropy = float(view.examples[0].maps[1].entropy[5])
    tip = browser.text("#tip")
    assert f"layer 1, head 5\nentropy {entropy:.3f} nats\nreach " in tip and "importance 1.625" in tip
    assert "shares its key/value head 1 with 3 others" in tip
    total = float(view.differences[0][1].total[5])
    assert f"differs by {total:.3f}" in tip
    browser.choose("show", "<b>cut</b>")
    assert len(browser.all(".cell.gone")) == 4 and len(browser.all(".cell.streaming")) == 4
    browser.hover(browser.one('[data-map="0"][data-head="2"]'))
    assert browser.text("#tip") == "layer 0, head 2\nremoved, <b>cut</b>"
    browser.hover(browser.one('[data-map="0"][data-head="6"]'))
    assert "head 2 <b>cut</b>" in browser.text("#tip")
    # By keyboard: arrows from head to head, Enter opens it.
    browser.driver.execute_script("arguments[0].focus()", browser.one('[data-map="0"][data-head="6"]'))
    browser.press(browser.keys.ARROW_DOWN, browser.keys.ARROW_RIGHT)
    assert (browser.focused("data-map"), browser.focused("data-head")) == ("1", "7")
    browser.press(browser.keys.ENTER)
    assert browser.one("#tab-head").get_attribute("aria-selected") == "true"
    assert browser.text("p.numbers").startswith("layer 1, head 7")
    assert not browser.errors() and browser.driver.title != "broken"


def test_tokens_with_lines(browser: Browser, page: tuple[Path, Any]) -> None:
    path, view = page
    browser.open(path)
    browser.one('[data-map="1"][data-head="2"]').click()
    browser.tab("lines")
    weights = view.examples[0].maps[1].weights

    def said(p: torch.Tensor, sign: str, unit: int) -> None:
        match = re.fullmatch(rf"t{unit + 10} {sign} (.*)", browser.text("#say"))
        assert match, browser.text("#say")
        values = [float(value) for value in re.findall(r" (\d\.\d{3})(?:,|$)", match[1])]
        wanted = p.sort(descending=True).values[: len(values)].tolist()
        assert len(values) == 5 and values == pytest.approx(wanted, abs=0.01)

    assert browser.all(".token")[3].text == ATTACK and len(browser.all(".token")) == 24
    browser.hover(browser.one('[data-side="queries"][data-unit="7"]'))
    said(weights[2, 7], "→", 7)
    browser.hover(browser.one('[data-side="keys"][data-unit="0"]'))
    said(weights[2, :, 0], "←", 0)
    browser.one('[data-chip="5"]').click()
    pressed = [each.get_attribute("aria-pressed") == "true" for each in browser.all("[data-chip]")]
    assert [head for head, on in enumerate(pressed) if on] == [2, 5]
    browser.one('[data-side="queries"][data-unit="9"]').click()
    said(weights[[2, 5], 9].mean(0), "→", 9)
    assert browser.one('[data-side="queries"][data-unit="9"]').get_attribute("aria-pressed") == "true"
    browser.press(browser.keys.ARROW_UP)
    said(weights[[2, 5], 8].mean(0), "→", 8)
    browser.press(browser.keys.ARROW_RIGHT)
    assert browser.focused("data-side") == "keys"
    drawn = """const canvas = document.querySelector(".links canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.some((value) => value > 0);"""
    assert browser.driver.execute_script(drawn)
    assert not browser.errors()


def test_one_head(browser: Browser, page: tuple[Path, Any]) -> None:
    path, view = page
    browser.open(path)
    browser.choose("show", "<b>cut</b>")
    browser.one('[data-map="1"][data-head="6"]').click()
    weights = view.compared[0].maps[1].weights[6]
    field = browser.one("canvas.values")
    browser.driver.execute_script("arguments[0].focus()", field)
    browser.press(*[browser.keys.ARROW_DOWN] * 9, *[browser.keys.ARROW_RIGHT] * 8)
    pair, value = browser.text("#say").split(": ")
    assert pair == "t19 → t18" and float(value) == pytest.approx(float(weights[9, 8]), abs=0.005)
    browser.press(browser.keys.ARROW_LEFT, browser.keys.ARROW_LEFT)
    assert browser.text("#say") == "t19 → t16: not seen"
    width = field.size["width"]
    browser.one('[aria-label="larger"]').click() if width < 12 * 28 else browser.one('[aria-label="smaller"]').click()
    assert browser.one("canvas.values").size["width"] != width
    # The edge of the window is drawn over the weights.
    pixels = """const [canvas] = arguments;
        return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join();"""
    with_edge = browser.driver.execute_script(pixels, field)
    browser.one("#edge").click()
    assert browser.driver.execute_script(pixels, field) != with_edge
    browser.choose("layer", view.examples[0].maps[0].name)
    browser.choose("head", "1 (removed)")
    assert "head 1 of layer 0 in “<b>cut</b>”: removed" in browser.text("#panel")
    assert not browser.errors()


def test_attribution(browser: Browser, page: tuple[Path, Any]) -> None:
    path, view = page
    browser.open(path)
    browser.tab("attribution")
    shares = view.rollout()[0].shares
    order = shares[-1, 11].argsort(descending=True)[:2].tolist()
    names = [ATTACK if unit == 3 else f"t{unit + 10}" for unit in order]
    said = re.findall(r"(?:most: |, )(.*?) (\d\.\d{3})", browser.text("#panel .side + div p.soft"))[:2]
    assert [name for name, _ in said] == names
    assert [float(value) for _, value in said] == pytest.approx(shares[-1, 11, order].tolist(), abs=0.005)
    browser.choose("token", "4: t14")
    assert "What “ t14” has" in browser.text("#panel") or "What “t14” has" in browser.text("#panel")
    browser.choose("method", "attention flow")
    assert "a maximum flow through the weights" in browser.text("#panel")
    assert not browser.errors()


def test_before_and_after(browser: Browser, page: tuple[Path, Any]) -> None:
    path, view = page
    browser.open(path)
    browser.tab("change")
    differences = view.differences[0]
    for layer, found in enumerate(differences):
        for head in range(8):
            text = browser.text(f'[data-map="{layer}"][data-head="{head}"]')
            total = float(found.total[head])
            assert text == ("" if total != total else f"{total:.2f}".replace("0.", "."))
    browser.one('[data-map="1"][data-head="4"]').click()
    rows = [row.text for row in browser.all("#largest tr")]
    assert rows[0].split() == ["query", "differs", "by", "full", "<b>cut</b>"]
    most = int(differences[1].by_query[4].argmax())
    assert rows[1].startswith(f"{most}: ") and f"{float(differences[1].by_query[4].max()):.2f}" in rows[1]
    assert len(browser.all("canvas.thumb")) == 2
    browser.one('[data-map="0"][data-head="0"]').click()
    assert "removed: nothing to compare" in browser.text("#panel")
    assert not browser.errors() and browser.driver.title != "broken"


def test_every_view_fits_every_width_and_scheme(browser: Browser, page: tuple[Path, Any], tmp_path: Path) -> None:
    """And colours follow the scheme: light, dark, and light again on paper."""
    background = "return getComputedStyle(document.body).backgroundColor"
    seen: dict[bool, str] = {}
    shots: set[bytes] = set()
    for dark in (False, True):
        for width in (WIDE, NARROW):
            browser.open(page[0], width=width, dark=dark)
            seen[dark] = browser.driver.execute_script(background)
            for tab in ("model", "lines", "head", "attribution", "change"):
                browser.tab(tab)
                assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
            shots.add(browser.driver.get_screenshot_as_png())
    assert seen[False] != seen[True] and len(shots) == 4
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.one("#tabs").is_displayed()
    assert browser.driver.execute_script(background) == "rgb(255, 255, 255)"  # of a dark screen too
    assert not browser.errors()


def test_pictures_long_inputs_and_two_sequences(browser: Browser, tmp_path: Path, monkeypatch: Any) -> None:
    vit = build("vit")
    path = tmp_path / "page.html"
    view = attention_view(vit, {"pixel_values": torch.randn(1, 3, 12, 16)}, path=path)
    browser.open(path)
    browser.tab("head")
    picture = browser.one("canvas.picture")
    picture.click()  # its middle: the third patch of the second row
    assert browser.text("#say").startswith("1,2 → 1,2: ")
    value = float(view.examples[0].maps[0].weights[0, 7, 7])
    assert float(browser.text("#say").split(": ")[1]) == pytest.approx(value, abs=0.01)
    browser.tab("attribution")
    assert browser.all("canvas.picture") and not browser.errors()

    monkeypatch.setattr(collect, "POOLED_UNITS", 4)
    model = build("llama")
    view = attention_view(model, batch(model, (14,)), path=path, exact_tokens=6)
    browser.open(path)
    assert "Pooled: a row is the mean of up to 4 queries" in browser.text("#facts")
    browser.tab("lines")
    assert [each.text for each in browser.all('[data-side="keys"]')] == [
        f"0{DASH}3",
        f"4{DASH}7",
        f"8{DASH}11",
        f"12{DASH}13",
    ]
    browser.tab("head")
    browser.driver.execute_script("arguments[0].focus()", browser.one("canvas.values"))
    browser.press(browser.keys.ARROW_DOWN)
    assert f"Strongest links of queries 4{DASH}7" in browser.text("#panel")
    links = view.examples[0].maps[0].links
    assert links is not None
    strongest = f"{float(links.weights[0, 4:8].max()):.2f}"
    assert strongest[:-1] in browser.text("table.list tr:nth-child(2)")

    t5 = build("t5", "causal")
    attention_view(t5, batch(t5, (7,)), path=path)
    browser.open(path)
    assert "5 cross" in browser.text("table.heads")
    browser.tab("attribution")
    browser.choose("of", "decoder.block → encoder.block")
    browser.tab("lines")
    browser.choose("layer", view_name(t5))
    assert len(browser.all('[data-side="queries"]')) == 5 and len(browser.all('[data-side="keys"]')) == 7
    assert not browser.errors()


def view_name(model: Any) -> str:
    """Of the first cross-attention."""
    maps = attention_view(copy.deepcopy(model), batch(model, (7,))).examples[0].maps
    return next(each.name for each in maps if each.is_cross)


def test_minilms_size_is_shown_within_two_seconds(browser: Browser, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=99, hidden_size=96, num_hidden_layers=6, num_attention_heads=12,
                        intermediate_size=96, max_position_embeddings=128)  # fmt: skip
    path = tmp_path / "page.html"
    attention_view(BertModel(config).eval(), {"input_ids": torch.randint(1, 99, (1, 128))}, path=path)
    assert path.stat().st_size <= 2_000_000
    assert min(browser.open(path) for _ in range(2)) < 2
    assert len(browser.all(".cell canvas")) == 72
