"""Random networks and mode sequences: never silently wrong. A failure prints the smallest scenario that shows it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import pytest
from fuzz.drawing_scenarios import draw_scenario
from fuzz.features import EXPECTED, features_of
from fuzz.models import build_model
from fuzz.shrinking import shrunk
from fuzz.trial import try_scenario

from lightning_convbn import find_conv_bn_pairs

SEEDS = 50
DRAWN = 150  # scenarios that are only drawn
CHUNK = 10
SHRUNK = 2  # failures that are made smaller; the others only tell their seeds


def assert_never_wrong(seeds: Iterable[int]) -> None:
    """Try the scenarios of some seeds. What they do must equal the twin's, and not too few may fold."""
    failures, compared, tried = [], 0, 0
    for seed in seeds:
        scenario = draw_scenario(seed)
        report = try_scenario(scenario)
        compared += report.runs > 0
        tried += 1
        if report.wrong is not None:
            smallest = f"\n  {shrunk(scenario)!r}" if len(failures) < SHRUNK else ""
            failures.append(f"seed {seed}: {report.wrong}{smallest}")
    assert not failures, "\n".join(failures)
    assert compared >= tried / 5, f"only {compared} of {tried} scenarios have run a folded pair"


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_random_networks_compute_what_their_plain_twins_compute(first: int) -> None:
    assert_never_wrong(range(first, first + CHUNK))


@pytest.mark.slow
def test_ten_thousand_random_networks_compute_what_their_plain_twins_compute() -> None:
    first, _, end = os.environ.get("CONVBN_FUZZ_SEEDS", "0:10000").partition(":")
    assert_never_wrong(range(int(first), int(end)))


def test_the_same_seed_gives_the_same_scenario() -> None:
    assert [repr(draw_scenario(seed)) for seed in range(20)] == [repr(draw_scenario(seed)) for seed in range(20)]
    assert len({repr(draw_scenario(seed)) for seed in range(20)}) == 20


def test_every_feature_is_drawn() -> None:
    drawn: Counter[str] = Counter()
    for seed in range(DRAWN):
        drawn += features_of(draw_scenario(seed))
    assert not EXPECTED - drawn.keys(), drawn


def test_most_random_networks_hold_pairs() -> None:
    scenarios = [draw_scenario(seed) for seed in range(DRAWN)]
    pairs = [len(find_conv_bn_pairs(build_model(scenario))) for scenario in scenarios]
    assert sum(count > 0 for count in pairs) >= DRAWN / 2
    assert sum(pairs) >= DRAWN
