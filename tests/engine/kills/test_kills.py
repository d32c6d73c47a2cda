"""Twelve of the kills of ``make kill``: two for each case."""

from __future__ import annotations

import pytest

from tests.engine.kills.cases import CASES
from tests.engine.kills.harness import Harness


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_and_the_end_is_the_same(harness: Harness, name: str):
    for _ in range(2):
        harness.run(name, kills=1)
    assert harness.tally.lost + harness.tally.inexact == []
    assert harness.tally.runs[name] == 2
