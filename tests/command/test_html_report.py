"""The page that `measure --html` writes, in a real browser: sorting, hovering, reading on a phone and in the dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import small_net
from torch import nn

from lightning_convbn.__main__ import main
from lightning_convbn.command import measure
from lightning_convbn.command.counting_and_timing import ModelMeasurer
from lightning_convbn.command.html_report import render_report
from lightning_convbn.command.inputs import Inputs, TensorInput

HOSTILE = '</script><script>owned=1</script><img src=x onerror="owned=1">&amp;\''


class Net(nn.Sequential):
    """Four blocks that keep differently much, one of them of a hostile name."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("stem", small_net()[:3])
        self.add_module(HOSTILE, nn.Sequential(nn.Conv2d(6, 24, 3), nn.BatchNorm2d(24), nn.Sigmoid()))
        self.add_module("a_name_that_is_very_long_" * 6, nn.Sequential(nn.BatchNorm2d(24), nn.Conv2d(24, 2, 3)))
        self.add_module("head", nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a network, written by the command."""
    file: Path = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "load_model", lambda *_: Net())
        options = ["--size", "16", "--rounds", "2", "--budget", "1GiB", "--html", str(file)]
        assert main(["measure", HOSTILE, *options]) == 0
    return file


class Opened:
    """The page, opened, with everything that the browser asked for and complained of."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(file.as_uri())

    def names(self) -> list[str]:
        """The blocks from top to bottom."""
        found: list[str] = self.page.locator("tbody:visible th").all_inner_texts()
        return found

    def values(self, label: str) -> list[float]:
        """A column's bytes from top to bottom."""
        cells = self.page.locator(f'tbody:visible td[data-label="{label}"]')
        return [float(value) for value in cells.evaluate_all("cells => cells.map(cell => cell.dataset.value)")]


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    """The page on a wide screen; at the end nothing was asked for but the file, and nothing complained of."""
    opened = Opened(browser, page_file, viewport={"width": 1280, "height": 800})
    yield opened
    assert opened.requests == [page_file.as_uri()]
    assert opened.complaints == []
    opened.page.close()


def test_a_click_sorts_and_another_one_turns_the_order(opened: Opened) -> None:
    in_order = opened.names()
    assert in_order[:2] == ["(input)", "stem.0 + 1"]
    header = opened.page.get_by_role("columnheader", name="Saved")
    header.get_by_role("button").click()
    saved = opened.values("Saved")
    assert len(set(saved)) > 2
    assert saved == sorted(saved, reverse=True)
    assert header.get_attribute("aria-sort") == "descending"
    assert opened.page.locator("[aria-sort]").count() == 1
    header.get_by_role("button").click()
    assert opened.values("Saved") == sorted(saved)
    assert header.get_attribute("aria-sort") == "ascending"
    opened.page.get_by_role("button", name=re.compile("^Block")).click()
    assert opened.names() == in_order


def test_the_keyboard_sorts_and_walks_the_rows(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Eval").focus()
    opened.page.keyboard.press("Enter")
    assert opened.values("Eval") == sorted(opened.values("Eval"), reverse=True)
    assert "descending" in opened.page.get_by_role("status").inner_text()
    assert opened.page.locator('#blocks tr[tabindex="0"]').count() == 1
    opened.page.locator('#blocks tr[tabindex="0"]').focus()
    opened.page.keyboard.press("End")
    assert opened.page.get_by_role("tooltip").inner_text().startswith(opened.names()[-1])
    opened.page.keyboard.press("ArrowUp")
    assert opened.page.get_by_role("tooltip").inner_text().startswith(opened.names()[-2])
    opened.page.keyboard.press("Escape")
    assert opened.page.get_by_role("tooltip").count() == 0


def test_hovering_tells_the_bytes_and_the_reason(opened: Opened) -> None:
    opened.page.locator("#blocks tr", has_text="very_long_.0").hover()
    tip = opened.page.get_by_role("tooltip").inner_text()
    assert re.search(r"^Eval: [\d,]+ bytes$", tip, re.MULTILINE)
    assert "BatchNorm2d, frozen: its input comes from" in tip
    opened.page.mouse.move(5, 5)
    assert opened.page.get_by_role("tooltip").count() == 0


def test_sections_add_up_to_the_blocks(opened: Opened) -> None:
    blocks = opened.values("Eval")
    opened.page.get_by_role("radio", name="Sections").check()
    assert len(opened.values("Eval")) < len(blocks)
    assert sum(opened.values("Eval")) == sum(blocks)
    shown = opened.page.locator(".card.eval .kept").inner_text()
    assert float(shown.split("MiB")[0]) == pytest.approx(sum(blocks) / 2**20, abs=0.051)


def test_a_hostile_name_is_text(opened: Opened) -> None:
    assert any(HOSTILE in name for name in opened.names())
    assert opened.page.locator("h1").inner_text() == HOSTILE
    assert opened.page.title().startswith(HOSTILE)
    assert not opened.page.evaluate("'owned' in window")
    assert opened.page.locator("img").count() == 0
    opened.page.get_by_role("row", name="onerror").first.hover()
    assert HOSTILE in opened.page.get_by_role("tooltip").inner_text()
    assert opened.page.locator("script").count() == 1


def test_no_script_runs_but_the_pages_own(browser: Any, page_file: Path, tmp_path: Path) -> None:
    """The last resort, should a name ever slip through."""
    broken = tmp_path / "broken.html"
    broken.write_text(page_file.read_text().replace("<h1>", "<script>owned=1</script><h1>"))
    opened = Opened(browser, broken)
    assert not opened.page.evaluate("'owned' in window")
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(browser: Any, page_file: Path, scheme: str) -> None:
    opened = Opened(browser, page_file, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    cut_off = "cells => cells.filter(cell => cell.scrollWidth > cell.clientWidth + 1).length"
    assert opened.page.locator("thead th:visible, tbody:visible td, tbody:visible th").evaluate_all(cut_off) == 0
    opened.page.locator("th.tune button").click()
    assert opened.values("Tune") == sorted(opened.values("Tune"), reverse=True)
    assert opened.page.get_by_role("button", name="Saved").bounding_box()["height"] >= 24  # to be hit by a finger


CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = colour => {
    const [r, g, b] = channels(colour).map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const background = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
  };
  const ratio = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + .05) / (dark + .05);
  };
  const texts = "h1, h2, h3, .facts, .kept, small, dt, dd, .legend li, label span, button, tbody th, tbody td, li";
  const of = (selector, colour) => [...document.querySelectorAll(selector)].filter(e => e.offsetWidth)
    .map(e => ratio(getComputedStyle(e)[colour], background(colour === "color" ? e : e.parentElement)));
  return { paper: background(document.body), text: Math.min(...of(texts, "color")),
           bars: Math.min(...of(".bar", "backgroundColor")) };
}"""


def test_light_and_dark_differ_and_both_can_be_read(browser: Any, page_file: Path) -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for what a bar shows."""
    seen = {}
    for scheme in ("light", "dark"):
        seen[scheme] = Opened(browser, page_file, color_scheme=scheme).page.evaluate(CONTRASTS)
        assert seen[scheme]["text"] >= 4.5, seen
        assert seen[scheme]["bars"] >= 3, seen
    assert seen["light"]["paper"] != seen["dark"]["paper"]


def test_paper_shows_the_table_without_its_buttons_arrows(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file, color_scheme="dark")
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert opened.page.evaluate(CONTRASTS)["paper"] == "rgb(255, 255, 255)"
    assert not opened.page.get_by_role("radio", name="Sections").is_visible()
    assert opened.page.pdf().startswith(b"%PDF")


def test_without_scripts_the_table_is_there(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file, java_script_enabled=False)
    assert opened.page.get_by_role("cell").count() > 12
    assert not opened.page.get_by_role("radio", name="Sections").is_visible()


def test_eval_alone_has_neither_ratio_nor_savings() -> None:
    measurer = ModelMeasurer(small_net(), Inputs((TensorInput((2, 3, 8, 8)),)), torch.float32, torch.device("cpu"))
    found = measurer.measure(["eval"], rounds=0, budget=None, progress=lambda step: None)
    page = render_report("net", found, facts="", notes=[], command="", versions="", budget="")
    assert "Saved</button>" not in page
    assert page.count("<article") == 1
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
