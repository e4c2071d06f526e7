"""Random networks and mode sequences: never silently wrong. A failure prints the scenario that shows it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import pytest
from fuzz.drawing_scenarios import draw_scenario
from fuzz.features import EXPECTED, features_of
from fuzz.trial import try_scenario

SEEDS = 150
CHUNK = 10


def assert_never_wrong(seeds: Iterable[int]) -> None:
    """Try the scenarios of some seeds. What they do must equal the twin's, and most must fold."""
    failures, folded, tried = [], 0, 0
    for seed in seeds:
        report = try_scenario(draw_scenario(seed))
        folded += report.folded > 0
        tried += 1
        if report.wrong is not None:
            failures.append(f"seed {seed}: {report.wrong}\n  {draw_scenario(seed)!r}")
    assert not failures, "\n".join(failures)
    assert folded >= tried / 3, f"only {folded} of {tried} scenarios have folded a pair"


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_random_networks_compute_what_their_plain_twins_compute(first: int) -> None:
    assert_never_wrong(range(first, first + CHUNK))


@pytest.mark.slow
def test_ten_thousand_random_networks_compute_what_their_plain_twins_compute() -> None:
    first, _, end = os.environ.get("CONVBN_FUZZ_SEEDS", "0:10000").partition(":")
    assert_never_wrong(range(int(first), int(end)))


def test_the_same_seed_gives_the_same_network() -> None:
    assert [repr(draw_scenario(seed)) for seed in range(20)] == [repr(draw_scenario(seed)) for seed in range(20)]


def test_every_feature_is_drawn() -> None:
    drawn: Counter[str] = Counter()
    for seed in range(SEEDS):
        drawn += features_of(draw_scenario(seed))
    assert not EXPECTED - drawn.keys(), drawn
