"""Products of the native library on every instruction set of this processor, beside float64 and float32 torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dpo_kernels import chunks, linear_dpo_loss, linear_logps, native, native_products
from dpo_kernels.linear_dpo import native as dpo_native
from dpo_kernels.linear_dpo import pair_chunks

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
SHAPES = (
    (1, 1, 1),
    (1, 40, 7),
    (13, 1, 300),
    (5, 33, 1),
    (7, 31, 17),
    (8, 32, 16),
    (23, 65, 257),
    (300, 70, 600),
    (4, 1100, 70),
    (3, 5, 5000),
    (530, 260, 40),
)
"""Rows, columns, depth: below, at and above what tiles, strips, panels and parts of a sum hold."""


@pytest.fixture(params=native.isas() if native.library() else ["none"], autouse=True)
def isa(request):
    with native.use_isa(request.param):
        yield request.param


def operands(m: int, n: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """The same a and b with either of their dimensions contiguous, within larger matrices."""
    a, b = torch.randn(m, k), torch.randn(k, n)

    def layouts(matrix: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = matrix.shape
        by_rows, by_columns = torch.full((rows, columns + 3), torch.nan), torch.full((columns, rows + 5), torch.nan)
        by_rows[:, :columns], by_columns[:, :rows] = matrix, matrix.T
        return by_rows[:, :columns], by_columns[:, :rows].T

    return list(itertools.product(layouts(a), layouts(b)))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_as_torch(shape: tuple[int, int, int], accumulate: bool) -> None:
    m, n, _ = shape
    before = torch.randn(m, n)
    for a, b in operands(*shape):
        exact = a.double() @ b.double() + (before if accumulate else 0)
        naive = a @ b + (before if accumulate else 0)
        # What lies beyond the result stays as it is.
        around = torch.full((m + 1, n + 2), 7.0)
        out = around[:m, 1:-1]
        out.copy_(before)
        native_products.compute_(out, a, b, accumulate=accumulate)
        unit = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (out.double() - exact).abs().max() <= 2 * (naive.double() - exact).abs().max() + unit
        out.fill_(7.0)
        assert (around == 7).all()


@pytest.mark.parametrize("shape", [(300, 70, 600), (530, 260, 40), (70, 90, 4200), (3, 900, 800)], ids=str)
def test_threads_and_runs_change_no_bit(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for a, b in operands(*shape):
        results = []
        for threads in (1, 1, 2, 7):
            monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
            results.append(torch.ones(shape[0], shape[1]))
            native_products.compute_(results[-1], a, b, accumulate=True)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_nan_and_infinity_stay_in_their_rows_and_columns() -> None:
    for a, b in operands(20, 50, 40):
        a[3, 7], a[4, 8], b[9, 33] = torch.nan, torch.inf, -torch.inf
        out = torch.empty(20, 50)
        native_products.compute_(out, a, b)
        torch.testing.assert_close(out, a @ b, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_denormal_results_are_kept() -> None:
    out = torch.empty(1, 1)
    native_products.compute_(out, torch.full((1, 1), 2.0**-100), torch.full((1, 1), 2.0**-40))
    assert out.item() == 2.0**-140


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that the library computes, on any processor."""
    shapes: list[tuple[int, ...]] = []
    compute = native_products.compute_

    def noted(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
        shapes.append((*out.shape, a.shape[1]))
        compute(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(native_products, "faster", lambda: True)
    monkeypatch.setattr(native_products, "compute_", noted)
    return shapes


def test_ops_take_them_where_they_are_faster(taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, log-probs and gradients of both ops are torch's; all of their products are the library's."""
    hidden, weight, labels = torch.randn(90, 12), torch.randn(333, 12), torch.randint(0, 333, (90,))
    cu, zeros = torch.tensor([0, 20, 50, 60, 90]), torch.zeros(4)
    results: dict[str, list[Tensor]] = {}
    for impl in ("native", "torch"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = linear_dpo_loss(*leaves, labels, cu, zeros, impl=impl)
        logps = linear_logps(*leaves, labels, impl=impl)
        frozen = linear_logps(leaves[0], weight, labels, impl=impl)
        found = [torch.autograd.grad(t, leaves) for t in (out.loss, logps.sum())]
        results[impl] = [out.loss, logps, *found[0], *found[1], *torch.autograd.grad(frozen.sum(), leaves[0])]
        if impl == "native":
            assert len(taken) == 3 + 4 + 2
            taken.clear()
    assert not taken
    torch.testing.assert_close(results["native"], results["torch"])


def test_what_they_do_not_take_is_torchs(taken) -> None:
    for dtype, m, step in ((torch.float64, 4, 1), (torch.float32, 0, 1), (torch.float32, 4, 2)):
        a, b = torch.randn(m, 3 * step, dtype=dtype)[:, ::step], torch.randn(3, 5, dtype=dtype)
        out = torch.empty(m, 5, dtype=dtype)
        native_products.product_(out, a, b)
        torch.testing.assert_close(out, a @ b)
    out = torch.empty(4, 10)[:, ::2]
    native_products.product_(out, torch.ones(4, 3), torch.ones(3, 5))
    assert (out == 3).all()
    assert not taken


def test_only_where_mkl_leaves_vectors_unused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for intel, mkl in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(native, "made_by_intel", lambda intel=intel: intel)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        assert native_products.faster() == (isa == "avx512" and mkl and not intel)


def test_scratch_memory_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sums in parts and of each thread that has a part; in the workspace of the paired loss, too."""
    monkeypatch.setattr(native, "threads", lambda: 1)
    assert native_products.scratch_bytes(10, 10, 10) == 0 or native_products.faster()
    monkeypatch.setattr(native_products, "faster", lambda: True)
    of_thread = native_products.scratch_bytes(100, 50, 10)
    assert 2**20 < of_thread < 2**22
    assert native_products.scratch_bytes(512, 896, 37984) == of_thread + 7 * 512 * 896 * 4
    # No more than 32 MiB of sums.
    assert native_products.scratch_bytes(2048, 4096, 32000) <= of_thread + 2**25
    monkeypatch.setattr(native, "threads", lambda: 64)
    assert native_products.scratch_bytes(64, 16, 16) == of_thread
    assert native_products.scratch_bytes(512, 37984, 896) == 64 * of_thread
    hidden, weight, cu = torch.empty(512, 64), torch.empty(4000, 64), [0, 256, 512]
    stated, without = (module.forward_workspace(hidden, weight, cu, True) for module in (dpo_native, pair_chunks))
    assert stated - without == max(native_products.scratch_bytes(*s) for s in ((512, 4000, 64), (512, 64, 4000)))


def test_torchs_own_scale_of_rows() -> None:
    rows, factor = torch.randn(4, 3).bfloat16(), torch.randn(4)
    out = torch.empty(4, 3)
    chunks.scale_rows_(out, rows, factor)
    assert torch.equal(out, rows * factor[:, None])
