"""Metrics of each set of a mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.train.by_source import sums_by_source
from engine.train.scored import Scored


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_set_whose_numbers_are_not_finite_leaves_the_others_alone(wrong):
    values = torch.arange(1.0, 5.0)
    scored = Scored(values, values, -values, values, values, values, torch.zeros(4, 0, dtype=torch.float64))
    sources = np.array([0, 1, 0, 1])
    want = sums_by_source(scored, sources, 3)
    assert want[:, :2].tolist() == [[2, 4], [2, 6], [0, 0]]
    losses = values.clone()
    losses[1] = wrong
    found = sums_by_source(scored._replace(losses=losses), sources, 3)
    assert found[[0, 2]].equal(want[[0, 2]])
    assert not found[1, 1].isfinite()
    assert found[1, 2:].equal(want[1, 2:])
