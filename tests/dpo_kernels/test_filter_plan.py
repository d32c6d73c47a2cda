"""Which tiles a filtered backward keeps: the masses it is decided by, the budget of every row, the blocks of rows."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dpo_kernels.head import Head
from dpo_kernels.linear_logps import slices, tile_filter
from dpo_kernels.linear_logps.interface import Want
from dpo_kernels.linear_logps.tile_filter import COLUMNS, FILTER_STATS, plan_filter
from tests.dpo_kernels.filter_setup import IGNORED, IMPLS, MODULES, peaked


@pytest.mark.parametrize("impl", IMPLS)
def test_masses_are_those_of_the_softmax(impl: str, monkeypatch) -> None:
    """Whatever the slices of the forward are; near logits of 1e4 and with a bias of -inf, too."""
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 300)
    hidden, weight, labels, bias = peaked(T=9)
    for offset in (0.0, 1e4, -1e4):
        shifted = bias + offset
        shifted[: 2 * COLUMNS + 3] = -torch.inf
        p = (hidden @ weight.T + shifted).softmax(-1)
        expected = torch.stack([part.sum(-1) for part in p.split(COLUMNS, dim=1)], dim=1)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-2 if offset else 1e-4)):
            inputs = (hidden.to(dtype), Head(weight.to(dtype), shifted.to(dtype)), labels)
            want = Want(tile_mass=True)
            mass = MODULES[impl].forward(*inputs, ignore_index=IGNORED, want=want).mass_TC
            used = labels != IGNORED
            assert_close(mass[used].double(), expected[used], rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 4, 128])
@pytest.mark.parametrize("filter_mass", [0.0, 1e-3, 0.1, 0.9])
def test_plan(filter_mass: float, rows: int) -> None:
    """No row of any block loses more than the budget, no label's tile goes, and one tile more would be too much."""
    T, C = 203, 17
    for sharpness in (0.1, 3.0, 30.0):
        mass = (sharpness * torch.randn(T, C, dtype=torch.float64)).softmax(-1)
        labels = torch.randint(0, C * COLUMNS, (T,))
        labels[torch.rand(T) < 0.2] = IGNORED
        arguments = {"ignore_index": IGNORED, "filter_mass": filter_mass, "rows": rows}
        plan = plan_filter(mass, labels, **arguments)
        order, kept = plan.kept
        assert order.sort().values.equal(torch.arange(T))
        kept_TC = torch.empty(T, C, dtype=torch.bool).index_copy_(0, order, kept.repeat_interleave(rows, 0)[:T])
        used = labels != IGNORED
        assert kept_TC[used, labels[used] // COLUMNS].all()
        lost = (mass * ~kept_TC).sum(1)[used]
        assert lost.max() <= filter_mass + 1e-12
        found = tile_filter.filter_stats(plan, FILTER_STATS, torch.float64)
        assert_close(found["dropped_mass"][used], lost, rtol=0, atol=1e-12)
        assert_close(found["kept_tiles"], kept_TC.double().mean(1))
        block = torch.empty(T, dtype=torch.int64).index_copy_(0, order, torch.arange(T) // rows)
        label_tiles = torch.zeros(len(kept), C, dtype=torch.bool)
        label_tiles[block[used], labels[used] // COLUMNS] = True
        for b in range(len(kept)):
            members = used & (block == b)
            assert members.any() or not kept[b].any()
            free = kept[b] & ~label_tiles[b]
            if free.any():
                cheapest = mass[members][:, free].amax(0).argmin()
                more = (mass[members] * ~kept[b]).sum(1) + mass[members][:, free][:, cheapest]
                assert more.max() > filter_mass - 1e-12


def test_plan_keeps_what_is_not_a_number() -> None:
    mass = torch.zeros(3, 5)
    mass[1, 4] = torch.nan
    plan = plan_filter(mass, torch.tensor([0, 1, IGNORED]), ignore_index=IGNORED, filter_mass=0.5, rows=1)
    assert plan.kept.kept_BC.tolist() == [[True, *[False] * 4], [True, *[False] * 3, True], [False] * 5]


def test_similar_rows_share_blocks() -> None:
    """Half of the rows need one tile, half need all: together they would need all of them everywhere."""
    C = 10
    mass = torch.full((256, C), 1.0 / C)
    mass[::2] = torch.nn.functional.one_hot(torch.arange(128) % C, C).float()
    labels = torch.where(torch.arange(256) % 2 == 0, torch.arange(256) // 2 % C * COLUMNS, 0)
    plan = plan_filter(mass, labels, ignore_index=IGNORED, filter_mass=1e-2, rows=16)
    assert plan.kept.kept_BC.double().mean() < 0.65
