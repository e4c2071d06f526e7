"""Peak against step time in the picture and on the page of `measure`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.command_line import SMALL
from matplotlib.image import imread

from lightning_convbn.__main__ import main
from lightning_convbn.command.results import TITLES, VARIANTS


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_page_has_a_point_for_each_variant_that_was_timed(rounds: int, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["measure", *SMALL, "--rounds", str(rounds), "--html", str(page)]) == 0
    drawings = re.findall(r"<svg.*?</svg>", page.read_text())
    titles = re.findall(r"<title>(.*?): [\d.,]+ MiB, [\d.,]+ ms</title>", "".join(drawings))
    assert titles == ([TITLES[variant] for variant in VARIANTS] if rounds else [])


def test_the_curve_joins_the_points_of_tune_mode(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["measure", *SMALL, "--rounds", "2", "--html", str(page)]) == 0
    (curve,) = re.findall(r'points="(.*?)"', page.read_text())
    circles = re.findall(r'<g class="tune[\w-]*"><circle cx="(.*?)" cy="(.*?)"', page.read_text())
    assert curve.split() == [",".join(point) for point in circles]


def test_the_picture_has_room_for_it_if_something_was_timed(tmp_path: Path) -> None:
    heights = []
    for rounds in ("0", "2"):
        picture = tmp_path / f"{rounds}.png"
        assert main(["measure", *SMALL, "--rounds", rounds, "--plot", str(picture)]) == 0
        heights.append(imread(picture).shape[0])
    assert heights[0] < heights[1]
