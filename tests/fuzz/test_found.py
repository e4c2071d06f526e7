"""What the fuzzer has found, as the smallest scenario of each kind."""

from __future__ import annotations

import pytest
from fuzz.found import FOUND
from fuzz.trial import try_scenario


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_not_wrong(name: str) -> None:
    report = try_scenario(FOUND[name])
    assert report.wrong is None, f"{report.wrong}\n{FOUND[name]!r}"
