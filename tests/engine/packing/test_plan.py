"""Plans: every group once, no pack over budget, the same groups per step whatever the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.schema import PackingConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.packing import check_fits, group_costs, group_sizes, pack_groups, plan_epoch
from engine.packing.plan import PAIRS_PER_ROW

pytestmark = pytest.mark.property

group_lengths = st.lists(
    st.lists(st.integers(1, 60), min_size=3, max_size=6).map(lambda n: np.asarray(n, np.int64)), min_size=1, max_size=60
)


def planned(lengths, *, seed=42, epoch=0, ranks=1, rank=0, **packing):
    return plan_epoch(lengths, PackingConfig(**packing), seed=seed, epoch=epoch, ranks=ranks, rank=rank)


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
        return planned(
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


@given(group_lengths, st.integers(1, 9), st.integers(700, 1500), st.booleans(), st.integers(0, 3), st.integers(1, 3))
def test_ranks_share_the_groups_of_each_step(lengths, pairs, budget, share, seed, ranks):
    options = {"pairs_per_step": pairs, "tokens_per_pack": budget, "share_prompts": share, "seed": seed}
    alone = planned(lengths, **options)
    plans = [planned(lengths, **options, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert plans == [planned(lengths, **options, ranks=ranks, rank=rank) for rank in range(ranks)]
    if ranks == 1:
        assert plans == [alone]
    sizes = group_sizes(lengths, share_prompts=share)
    for steps in zip(alone, *plans, strict=True):
        whole, *parts = ([list(pack) for pack in step] for step in steps)
        assert len({len(packs) for packs in parts}) == 1
        assert sorted(i for packs in parts for pack in packs for i in pack) == sorted(i for p in whole for i in p)
        assert all(sizes[pack].sum() <= budget for packs in parts for pack in packs)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_work_equally_long(ranks):
    generator = np.random.default_rng(0)
    lengths = [np.minimum(generator.lognormal(5, 0.8, 3).astype(np.int64) + 1, 1000) for _ in range(2048)]
    costs = group_costs(lengths)
    options = {"pairs_per_step": 256, "tokens_per_pack": 8192, "ranks": ranks}
    plans = [planned(lengths, **options, rank=rank) for rank in range(ranks)]
    for parts in zip(*plans, strict=True):
        cost = np.array([[costs[list(pack)].sum() for pack in packs] for packs in parts])
        assert cost.max(0).sum() <= 1.05 * cost.sum() / ranks


def test_a_rank_without_groups_has_empty_packs():
    lengths = [np.array([2, 3, 4])]
    plans = [planned(lengths, pairs_per_step=4, tokens_per_pack=9, ranks=3, rank=rank) for rank in range(3)]
    assert plans == [[((0,),)], [((),)], [((),)]]
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1 for ranks=2, got 2"):
        planned(lengths, pairs_per_step=4, tokens_per_pack=9, ranks=2, rank=2)


def test_an_even_spread_that_does_not_fit_takes_more_packs():
    lengths = [np.array([n - 2, 1, 1]) for n in (50, 50, 34, 33, 33)]
    options = {"pairs_per_step": 5, "tokens_per_pack": 100}
    assert planned(lengths, **options, shuffle=False) == [((0, 1), (2, 3, 4))]
    plans = [planned(lengths, **options, shuffle=False, ranks=2, rank=rank) for rank in range(2)]
    assert plans == [[((3, 4), (2,))], [((0,), (1,))]]


def test_costs():
    lengths = [np.array([10, 3, 4]), np.array([5, 1, 2, 3])]
    pairs = 55 + (30 + 6) + (40 + 10)
    assert group_costs(lengths)[0] == PAIRS_PER_ROW * 17 + pairs
    assert group_costs(lengths, share_prompts=False)[0] == PAIRS_PER_ROW * 27 + pairs + 55


def test_epochs_differ_and_source_order_is_kept_without_shuffle():
    lengths = [np.array([2, 3, 4])] * 20
    options = {"pairs_per_step": 20, "tokens_per_pack": 9}
    first, second = (planned(lengths, **options, epoch=e) for e in (0, 1))
    assert first != second
    ordered = planned(lengths, **{**options, "pairs_per_step": 3}, shuffle=False)
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
