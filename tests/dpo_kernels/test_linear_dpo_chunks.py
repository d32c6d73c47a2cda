"""Chunks of ``linear_dpo_loss``: how pairs are divided, pairs longer than the buffer, products that are left out."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import chunks, linear_dpo_loss
from dpo_kernels.linear_dpo import native as dpo_native
from dpo_kernels.linear_dpo import pair_chunks
from dpo_kernels.linear_dpo import torch_chunks as dpo_torch
from dpo_kernels.linear_logps import native as logps_native
from dpo_kernels.linear_logps import slices
from dpo_kernels.linear_logps import torch_chunks as logps_torch
from tests.dpo_kernels.linear_dpo_setup import LOSSES, Case, compose, results, upstream_of

LONG = RESPONSE_LENGTHS["a long pair between short ones"]


def test_plan_of_chunks() -> None:
    plan, Chunk = chunks.plan_chunks, chunks.Chunk
    cu = [0, *itertools.accumulate((4, 4) * 6)]
    assert plan(cu, 1000, 0) == [Chunk(0, 6, False)]
    assert plan(cu, 40, 0) == [Chunk(0, 3, False), Chunk(3, 3, False)]
    assert plan(cu, 8, 0) == [Chunk(i, 1, False) for i in range(6)]
    assert plan(cu, 7, 8) == [Chunk(i, 1, False) for i in range(6)]
    assert plan(cu, 7, 7) == [Chunk(i, 1, True) for i in range(6)]
    cu = [0, *itertools.accumulate(LONG)]
    assert plan(cu, 10, 20) == [Chunk(0, 1, False), Chunk(1, 1, True), Chunk(2, 1, False)]
    assert plan([0], 10, 20) == []
    assert plan([0] * 9, 10, 20) == [Chunk(0, 4, False)]


@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
@pytest.mark.parametrize("lengths", RESPONSE_LENGTHS.values(), ids=RESPONSE_LENGTHS)
def test_small_buffers(lengths, loss_type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of 6 rows and D = 5: several chunks, pairs held whole, pairs split for the late scalar."""
    case = Case(lengths)
    monkeypatch.setattr(pair_chunks, "BUFFER_BYTES", 6 * 23 * 8)
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 10)
    monkeypatch.setattr(chunks, "CACHE_BYTES", 2 * 23 * 8)
    upstream = upstream_of(case, "mean")
    leaves = case.leaves()
    expected = results(compose(case, leaves, loss_type=loss_type), leaves, upstream)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], loss_type=loss_type)
    torch.testing.assert_close(results(out, leaves, upstream), expected)


@pytest.mark.parametrize("lengths", [(40, 30), (60, 5), (5, 60), (64, 0)])
@pytest.mark.parametrize("loss_type", ["sigmoid", "bco_pair", "orpo"])
def test_late_scalar_of_a_pair_longer_than_the_buffer(lengths, loss_type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both with one unknown per pair and with two; the split must be exercised, not avoided."""
    case = Case((3, 2, *lengths, 1, 6), D=3, V=11)
    monkeypatch.setattr(pair_chunks, "BUFFER_BYTES", 10 * 11 * 8)
    plan = chunks.plan_chunks(case.cu.tolist(), 10, 3)
    assert [chunk.split for chunk in plan] == [False, True, False]
    upstream = upstream_of(case, "sum")
    options = {"loss_type": loss_type, "reduction": "sum", "softcap": 3.0}
    leaves = case.leaves()
    expected = results(compose(case, leaves, **options), leaves, upstream)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl="torch", **options)
    torch.testing.assert_close(results(out, leaves, upstream), expected)


def test_products_that_are_not_needed_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of one logits product: 3 for training, 2 with a frozen head or hidden, 1 without gradients."""
    case = Case((6, 7, 3, 9), D=8, V=64, dtype=torch.float32, ignored=False)
    unit = 2 * 25 * 8 * 64
    work = []

    def counted(out, a, b, *, accumulate=False):
        work.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        chunks.product_(out, a, b, accumulate=accumulate)

    for shared, implementations in ((pair_chunks, (dpo_torch, dpo_native)), (slices, (logps_torch, logps_native))):
        for module in implementations:
            passes = module.PASSES._replace(product_=counted)
            for direction in ("forward", "backward"):
                if hasattr(shared, direction):
                    monkeypatch.setattr(module, direction, functools.partial(getattr(shared, direction), passes))

    def products(trained, **options) -> float:
        work.clear()
        hidden, weight, _ = case.leaves(trained=trained)
        out = linear_dpo_loss(hidden, weight, case.labels, case.cu, case.ref, **options)
        if any(trained[:2]):
            out.loss.sum().backward()
        return sum(work) / unit

    assert products((1, 1, 0)) == 3
    assert products((1, 0, 0)) == 2
    assert products((0, 1, 0)) == 2
    assert products((0, 0, 0)) == 1
    assert products((1, 1, 0), reduction="none") == 4
    assert products((1, 0, 0), reduction="none") == 2
    assert products((1, 1, 0), loss_type="aot") == 4
