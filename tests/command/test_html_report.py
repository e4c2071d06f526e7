"""The page that `measure --html` writes, in a real browser: it needs no network, and a name is a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.networks import small_net
from torch import nn

from lightning_convbn.command import measure
from lightning_convbn.command.main import main
from lightning_convbn.command.results import TITLES

HOSTILE = '</script><script>owned=1</script><img src=x onerror="owned=1"><a href="javascript:owned=1">&amp;\''
TYPED = ["measure", HOSTILE, "--size", "16", "--budget", "1GiB", "--html"]


class Net(nn.Sequential):
    """Blocks that keep differently much, two of them of difficult names."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("stem", small_net()[:3])
        self.add_module(HOSTILE.replace(".", ""), nn.Sequential(nn.Conv2d(6, 24, 3), nn.BatchNorm2d(24), nn.Sigmoid()))
        self.add_module("a_name_that_is_very_long_" * 6, nn.Sequential(nn.BatchNorm2d(24), nn.Conv2d(24, 2, 3)))
        self.add_module("head", nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "load_model", lambda *_: Net())
        assert main([*TYPED, str(file), "--rounds", "2"]) == 0
    return file


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, opened. At the end nothing was asked for but the file, and nothing complained of."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    seen: list[str] = []
    opened.on("request", lambda request: seen.append(request.url))
    opened.on("console", lambda message: seen.append(message.text))
    opened.on("pageerror", lambda error: seen.append(str(error)))
    opened.goto(page_file.as_uri())
    opened.wait_for_selector(".barlayer .point")
    yield opened
    assert seen == [page_file.as_uri()]
    opened.close()


def blocks(page: Any) -> list[str]:
    ticks = page.locator(".y2tick text").all()
    return [name for _, name in sorted((tick.bounding_box()["y"], tick.text_content()) for tick in ticks)]


def test_the_page_shows_the_table_both_pictures_and_the_command(page: Any) -> None:
    title = page.locator(".gtitle").text_content()
    for said in ("3 of 4 BatchNorms folded", "input 8x3x16x16, float32", "training it is unstable", "--rounds 2"):
        assert said in title
    cells = "".join(page.locator(".table .cell-text").all_text_contents()).replace(" ", "")  # it breaks lines
    assert all(title.replace(" ", "") in cells for title in TITLES.values())
    assert page.locator(".scatterlayer .point").count() == len(TITLES)
    assert page.locator(".legendtext").all_text_contents() == [*TITLES.values()]
    assert page.locator(".barlayer .point").count() == len(TITLES) * len(blocks(page))


def test_the_blocks_are_in_the_order_of_the_model_or_the_largest_is_first(page: Any) -> None:
    in_order = blocks(page)
    assert in_order[:2] == ["(input)", "stem.0 + 1"]
    page.locator(".updatemenu-button", has_text="largest first").click()
    page.wait_for_timeout(200)
    by_size = blocks(page)
    assert sorted(by_size) == sorted(in_order)
    assert "owned" in by_size[0]  # 24 channels
    page.locator(".updatemenu-button", has_text="order of the model").click()
    page.wait_for_timeout(200)
    assert blocks(page) == in_order


def test_hovering_tells_the_bytes_and_the_reason(page: Any) -> None:
    (place,) = (place for place, name in enumerate(blocks(page)) if name.endswith("very_long_.0"))
    page.locator(".barlayer .trace").first.locator(".point").nth(place).hover(force=True)
    page.wait_for_selector(".hovertext")
    shown = page.locator(".hovertext").text_content()
    assert "a_name_that_is_very_long_" * 6 in shown  # the tick has its end
    assert "BatchNorm2d, frozen: its input comes from" in shown
    assert " MiB" in shown


def test_a_hostile_name_is_text(page: Any) -> None:
    assert page.locator(".gtitle").text_content().startswith(HOSTILE)
    assert not page.evaluate("'owned' in window")
    assert page.locator("img, a[href^=javascript]").count() == 0


def test_without_rounds_there_are_only_blocks(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load_model", lambda *_: small_net())
    assert main([*TYPED, str(tmp_path / "page.html"), "--rounds", "0", "--variants", "eval"]) == 0
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector(".barlayer .point")
    assert page.locator(".scatterlayer").count() == 0
    page.close()
