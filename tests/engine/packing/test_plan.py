"""Plans: every group once, no pack over budget, the same groups per step whatever the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.packing import check_fits, group_sizes, pack_groups, plan_epoch

group_lengths = st.lists(
    st.lists(st.integers(1, 60), min_size=3, max_size=6).map(lambda n: np.asarray(n, np.int64)), min_size=1, max_size=60
)


@given(st.lists(st.integers(1, 100), max_size=80), st.integers(100, 300))
def test_packs_hold_each_group_once_within_budget(sizes, budget):
    packs = pack_groups(sizes, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in pack) <= budget for pack in packs)
    assert len(packs) <= 11 / 9 * max(1, -(-sum(sizes) // budget)) * 2 + 1


def test_best_fit_decreasing_fills_the_tightest_pack():
    assert pack_groups([3, 6, 5, 4, 2], 10) == [(1, 3), (0, 2, 4)]


@given(group_lengths, st.integers(1, 9), st.integers(700, 1500), st.booleans(), st.integers(0, 3))
def test_steps_do_not_depend_on_the_budget(lengths, pairs, budget, share, seed):
    def plan(tokens_per_pack, share_prompts):
        return plan_epoch(
            lengths,
            pairs_per_step=pairs,
            tokens_per_pack=tokens_per_pack,
            share_prompts=share_prompts,
            seed=seed,
        )

    steps = plan(budget, share)
    assert steps == plan(budget, share)
    members = [sorted(i for pack in step for i in pack) for step in steps]
    assert members == [sorted(i for pack in step for i in pack) for step in plan(10**6, not share)]
    assert sorted(i for step in members for i in step) == list(range(len(lengths)))
    assert [len(m) for m in members[:-1]] == [pairs] * (len(members) - 1)
    sizes = group_sizes(lengths, share_prompts=share)
    assert all(sizes[list(pack)].sum() <= budget for step in steps for pack in step)


def test_epochs_differ_and_source_order_is_kept_without_shuffle():
    lengths = [np.array([2, 3, 4])] * 20
    options = {"pairs_per_step": 20, "tokens_per_pack": 9}
    first, second = (plan_epoch(lengths, **options, epoch=e) for e in (0, 1))
    assert first != second
    ordered = plan_epoch(lengths, **{**options, "pairs_per_step": 3}, shuffle=False)
    assert [i for step in ordered for pack in step for i in pack] == list(range(20))


def test_sizes():
    lengths = [np.array([10, 3, 4]), np.array([5, 1, 2, 3])]
    assert group_sizes(lengths).tolist() == [17, 11]
    assert group_sizes(lengths, share_prompts=False).tolist() == [27, 21]


def test_longest_group_is_named():
    ids = np.arange(50, dtype=np.int32)
    dataset = PreferenceDataset(
        [PreferenceGroup(3, ids[:2], (ids[:3], ids[:1])), PreferenceGroup(17, ids[:20], (ids[:9], ids[:4]))]
    )
    check_fits(dataset, tokens_per_pack=33)
    with pytest.raises(UserError, match=r"row 17 needs 33 tokens: set packing\.tokens_per_pack to at least 33"):
        check_fits(dataset, tokens_per_pack=32)
    with pytest.raises(UserError, match="no preference rows are left"):
        check_fits(PreferenceDataset([]), tokens_per_pack=32)
