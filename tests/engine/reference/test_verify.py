from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.data.groups import PreferenceDataset
from engine.errors import UserError
from engine.reference import verify_rows


@pytest.fixture
def stored(policy, dataset) -> list[tuple[np.ndarray, ...]]:
    return [tuple(policy.expected(group)) for group in dataset]


def test_the_right_values_pass_and_only_a_few_rows_are_computed(policy, dataset, stored):
    verify_rows(policy, dataset, stored)
    assert len(policy.scored) == 4
    sizes = [int(n.sum()) for n in dataset.lengths]
    rows = [row for pack in policy.scored for row in pack]
    assert {sizes[rows[0]], sizes[rows[-1]]} == {min(sizes), max(sizes)}
    assert set(policy.modes) == {(True, False, False)}


def test_sums_are_checked_too(policy, dataset, stored):
    sums = [tuple(float(v.sum()) for v in group) for group in stored]
    verify_rows(policy, dataset, sums)
    wrong = [tuple(v * 1.02 for v in group) for group in sums]
    with pytest.raises(UserError, match="differ from the model's by up to"):
        verify_rows(policy, dataset, wrong)


def test_other_weights_are_noticed_and_rows_named(make_policy, dataset, stored):
    other = make_policy(seed=1)
    with pytest.raises(UserError, match=r"of rows \d+, \d+.*nats per token \(checked 4 rows, allowed 0.001\)"):
        verify_rows(other, dataset, stored)


@pytest.mark.parametrize("change", ["one token", "small bias", "length", "nan"])
def test_one_wrong_response_is_noticed(policy, dataset, stored, change):
    longest = max(range(len(dataset)), key=lambda i: dataset.lengths[i].sum())
    values = stored[longest][1].copy()
    if change == "one token":
        values[0] += 0.01
    elif change == "small bias":
        values += 6e-4
    elif change == "nan":
        values[0] = np.nan
    else:
        values = values[1:]
    stored[longest] = (stored[longest][0], values)
    with pytest.raises(UserError, match=f"of row {dataset[longest].row} differ"):
        verify_rows(policy, dataset, stored)


def test_the_tolerance_follows_the_dtype(make_policy, dataset, stored):
    near = [tuple(v + 0.02 * (-1) ** np.arange(len(v)).astype(np.float32) for v in g) for g in stored]
    verify_rows(make_policy(dtype=torch.bfloat16), dataset, near)
    with pytest.raises(UserError):
        verify_rows(make_policy(), dataset, near)
    verify_rows(make_policy(), dataset, near, atol=0.5)


def test_fewer_rows_than_asked_for(policy, make_groups):
    groups = [replace(make_groups(1)[0], row=7)]
    verify_rows(policy, PreferenceDataset(groups), [tuple(policy.expected(groups[0]))])
    with pytest.raises(UserError, match="of row 7 differ"):
        verify_rows(policy, PreferenceDataset(groups), [(0.0, 0.0)])
