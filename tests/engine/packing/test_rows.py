"""A pack as rows: every token in its place and back, gradients added, and no more padding than blocks cost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.config.schema import PackingConfig
from engine.data.groups import PreferenceGroup
from engine.data.lengths import GroupLengths
from engine.packing import build_batch
from engine.packing.plan import group_sizes, pack_rows, plan_epoch
from engine.packing.rows import BLOCK_COST, plan_rows


def groups() -> list[PreferenceGroup]:
    ids = iter(range(1000))

    def draw(count: int) -> np.ndarray:
        return np.array([next(ids) for _ in range(count)], dtype=np.int32)

    return [PreferenceGroup(0, draw(3), (draw(4), draw(2), draw(5))), PreferenceGroup(1, draw(1), (draw(1), draw(2)))]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("blocks", ["alike", "together", "alone"])
def test_rows_hold_each_response_behind_its_prompt(share, blocks):
    batch = build_batch(groups(), share_prompts=share)
    rows = plan_rows(batch.plan.segments, blocks)
    found = [
        ids[mask.bool()].tolist()
        for block, masks in zip(rows.split(batch.input_ids_T, fill=-1), rows.masks(), strict=True)
        for ids, mask in zip(block, masks, strict=True)
    ]
    want = [np.r_[g.prompt_ids, r].tolist() for g in groups() for r in g.response_ids]
    assert sorted(found) == sorted(want)
    assert (torch.cat([b.flatten() for b in rows.split(batch.input_ids_T, fill=-1)]) == -1).sum() == (
        rows.num_cells - sum(map(len, want))
    )
    assert torch.equal(rows.join(rows.split(batch.input_ids_T)), batch.input_ids_T)
    assert len(rows.shapes) == {"alike": 1, "together": 1, "alone": 5}[blocks]


@pytest.mark.parametrize("share", [True, False])
def test_rows_end_to_end_come_with_where_each_begins(share):
    batch = build_batch(groups(), share_prompts=share)
    rows = plan_rows(batch.plan.segments, "joined")
    want = [np.r_[g.prompt_ids, r].tolist() for g in groups() for r in g.response_ids]
    (ids,) = rows.split(batch.input_ids_T, fill=-1)
    ends, on_cpu, numbers = rows.boundaries
    assert [ids[0, a:b].tolist() for a, b in pairwise(ends.tolist())] == want
    assert numbers.tolist() == [[n for n, row in enumerate(want) for _ in row]]
    assert ends.dtype == numbers.dtype == torch.int32
    assert rows.shapes == ((1, rows.num_row_tokens),)
    assert torch.equal(rows.join([ids]), batch.input_ids_T)
    moved = rows.map_tensors(lambda tensor: tensor.to("meta")).boundaries
    assert [part.device.type for part in moved] == ["meta", "cpu", "meta"]
    assert torch.equal(moved.cu_seqlens_cpu_R1, on_cpu)
    assert plan_rows(batch.plan.segments).boundaries is None


def test_gradients_of_a_shared_prompt_are_those_of_its_rows_added():
    batch = build_batch(groups())
    rows = plan_rows(batch.plan.segments)
    x = torch.randn(batch.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    (block,) = rows.split(x)
    weights = torch.randn_like(block)
    (got,) = torch.autograd.grad((block * weights).sum(), x)
    want = torch.zeros_like(x).index_add(0, rows.picks_K, weights.flatten(0, 1)[rows.cells_K])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    upstream = torch.randn_like(x)
    (back,) = torch.autograd.grad(rows.join([block]), block, upstream)
    assert torch.equal(back.flatten(0, 1)[rows.homes_T], upstream)
    assert back.count_nonzero() == upstream.count_nonzero()


def test_blocks_are_the_cheapest_division():
    ids = np.zeros(4000, np.int32)
    group = PreferenceGroup(0, ids[:1], tuple(ids[:n] for n in (3000, 2990, 20, 21, 22)))
    rows = plan_rows(build_batch([group]).plan.segments)
    assert rows.shapes == ((2, 3001), (3, 23))
    assert rows.num_cells + len(rows.shapes) * BLOCK_COST < 5 * 3001


def lengths(*shapes: tuple[int, ...]) -> GroupLengths:
    return GroupLengths.of([np.array(shape) for shape in shapes])


def test_packs_of_rows_hold_groups_of_like_length():
    found = lengths((1, 9, 3), (2, 28, 4), (5, 5, 5), (10, 20, 20), (1, 1, 1))
    assert group_sizes(found, in_rows=True).tolist() == [20, 60, 20, 60, 4]
    assert pack_rows(found, 120) == [(1, 3), (0, 2, 4)]
    assert pack_rows(found, 60) == [(1,), (3,), (0, 2, 4)]
    with pytest.raises(ValueError, match="group 1 has 60 tokens, more than tokens_per_pack=59"):
        pack_rows(found, 59)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_have_as_many_packs_of_rows_each(ranks):
    found = lengths(*((p, 7 * p % 30 + 1, p + 3) for p in range(1, 20)))
    packing = PackingConfig(pairs_per_step=8, tokens_per_pack=150, layout="rows")
    plans = [plan_epoch(found, packing, ranks=ranks, rank=rank) for rank in range(ranks)]
    seen: list[int] = []
    for steps in zip(*plans, strict=True):
        assert len({len(packs) for packs in steps}) == 1
        for pack in (pack for packs in steps for pack in packs if pack):
            widths = [int(found[i][0] + found[i][1:].max()) for i in pack]
            assert 2 * len(pack) * max(widths) <= 150
            seen += pack
    assert sorted(seen) == list(range(len(found)))
