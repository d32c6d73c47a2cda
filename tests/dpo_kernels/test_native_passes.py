"""Passes of the native library on every instruction set of this processor, beside float64 and float32 torch.

Legend: n rows of a block, V columns.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dpo_kernels import native, native_passes
from dpo_kernels.head import Head
from dpo_kernels.linear_logps.reference import token_stats
from dpo_kernels.linear_logps.stats import STATS, RunningStats
from dpo_kernels.linear_logps.tile_filter import COLUMNS
from dpo_kernels.native_passes import Found, Keep

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
HEADS = {
    "bare": {},
    "scaled": {"logit_scale": -1.7, "temperature": 0.6},
    "softcap": {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.7},
}
WIDTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 129, 1000, 4095, 4097, 8300)


@pytest.fixture(params=native.isas() if native.library() else ["none"], autouse=True)
def isa(request):
    with native.use_isa(request.param):
        yield request.param


def make_head(options: dict, V: int, bias: bool) -> Head:
    return Head(torch.empty(V, 0), torch.randn(V) if bias else None, **options)


class Exact(NamedTuple):
    """Of rows of x W^T, in the dtype of that."""

    logits_nV: Tensor
    factor_nV: Tensor
    """1 - tanh^2."""
    lse_n: Tensor
    gradient_nV: Tensor
    """onehot - softmax, times the factor."""

    @classmethod
    def of(cls, a_nV: Tensor, labels_n: Tensor, head: Head) -> Exact:
        s = (a_nV if head.bias_V is None else a_nV + head.bias_V) * head.logit_scale
        factor = torch.ones_like(s)
        if head.softcap is not None:
            tanh = torch.tanh(s / head.softcap)
            factor, s = 1 - tanh.square(), head.softcap * tanh
        z = s / head.temperature
        onehot = torch.zeros_like(z)
        inside = (labels_n >= 0) & (labels_n < z.shape[1])
        onehot[inside, labels_n[inside]] = 1
        return cls(z, factor, z.logsumexp(1), (onehot - z.softmax(1)) * factor)


def assert_as_near(found: Tensor, exact: Tensor, naive: Tensor) -> None:
    """At most twice as far from float64 as float32 torch is, and some units in the last place of the largest."""
    unit = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert found.isfinite().all()
    assert (found.double() - exact).abs().max() <= 2 * (naive.double() - exact).abs().max() + unit


class State:
    """What ``fold_`` carries."""

    def __init__(self, n: int, features: int = 0):
        self.max = torch.full((n,), -torch.inf)
        self.sum = torch.zeros(n)
        self.label_logit = torch.full((n,), 7.0)
        self.label_factor = torch.full((n,), 7.0)
        self.weighted = torch.zeros(n, features)
        self.stats = RunningStats(STATS, torch.empty(n, 1))

    @property
    def lse(self) -> Tensor:
        return self.max.double() + self.sum.double().log()

    def fold(
        self, block: Tensor, labels: Tensor, head: Head, first_column: int = 0, keep: Keep = Keep.INPUT, **changes
    ) -> None:
        found = Found(self.max, self.sum, self.label_logit, self.label_factor, self.weighted, self.stats)
        native_passes.fold_(block, labels, head, first_column, found._replace(**changes), keep)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("stats", [False, True])
def test_whole_rows(options: dict, bias: bool, stats: bool) -> None:
    for V in WIDTHS:
        n = 5
        head = make_head(options, V, bias)
        a, labels = torch.randn(n, V) * 3, torch.randint(0, V, (n,))
        exact, naive = Exact.of(a.double(), labels, head), Exact.of(a, labels, head)
        memory = torch.full((n, V + 3), torch.nan)
        block = memory[:, 1 : V + 1].copy_(a)
        state = State(n)
        state.fold(block, labels, head, keep=Keep.EXPS_LESS_LABEL, **({} if stats else {"stats": None}))
        assert memory[:, 0].isnan().all()
        assert memory[:, V + 1 :].isnan().all()
        assert_as_near(state.lse, exact.lse_n, naive.lse_n)
        at = labels[:, None]
        assert_as_near(state.label_logit, exact.logits_nV.gather(1, at)[:, 0], naive.logits_nV.gather(1, at)[:, 0])
        if head.softcap is not None:
            assert_as_near(state.label_factor, exact.factor_nV.gather(1, at)[:, 0], naive.factor_nV.gather(1, at)[:, 0])
        assert_as_near(block * (-1 / state.sum)[:, None], exact.gradient_nV, naive.gradient_nV)
        if stats:
            found = state.stats.finish(state.sum, labels, V)
            assert_as_near(found, *(token_stats(t.logits_nV, labels, -100, STATS) for t in (exact, naive)))


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.EXPS])
def test_slices_add_up(options: dict, keep: Keep) -> None:
    """Whatever the cuts, as for whole rows; what is relative to the maximum moves with it."""
    n, V, features = 6, 1000, 5
    head = make_head(options, V, bias=True)
    # Later slices raise the maximum, by much for some rows.
    a = torch.randn(n, V) + torch.linspace(0, 8, V) * torch.arange(n)[:, None]
    labels = torch.tensor([0, 999, 127, 128, 500, -1])
    exact, naive = Exact.of(a.double(), labels, head), Exact.of(a, labels, head)
    weight = torch.randn(V, features)
    state, masses = State(n, features), []
    for start, stop in ((0, 128), (128, 256), (256, 896), (896, 1000)):
        block = a[:, start:stop].clone()
        tiles = torch.full((n, -(-(stop - start) // COLUMNS)), torch.nan)
        state.fold(block, labels, head, start, keep=keep, tile_sum_nC=tiles)
        if keep == Keep.INPUT:
            assert torch.equal(block, a[:, start:stop])
        else:
            state.weighted += block @ weight[start:stop]
        masses.append(tiles.double() * (state.max.double() - exact.lse_n).exp()[:, None])
    assert_as_near(state.lse, exact.lse_n, naive.lse_n)
    inside = labels >= 0
    at = labels.clamp(min=0)[:, None]
    assert_as_near(state.label_logit[inside], *(t.logits_nV.gather(1, at)[inside, 0] for t in (exact, naive)))
    assert state.label_logit[~inside].eq(7).all()
    found = state.stats.finish(state.sum, labels, V)
    assert_as_near(found, *(token_stats(t.logits_nV, labels, -100, STATS) for t in (exact, naive)))
    p = (exact.logits_nV - exact.lse_n[:, None]).exp()
    if keep == Keep.EXPS:
        naive_p = naive.logits_nV.softmax(1) * naive.factor_nV
        weighted = state.weighted / state.sum[:, None]
        assert_as_near(weighted, (p * exact.factor_nV) @ weight.double(), naive_p @ weight)
    p[inside, labels[inside]] = 0
    mass = torch.stack([part.sum(1) for part in p.split(COLUMNS, dim=1)], dim=1)
    torch.testing.assert_close(torch.cat(masses, dim=1), mass, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_gradient_of_a_slice(options: dict, bias: bool) -> None:
    for V in WIDTHS:
        head = make_head(options, V + 9, bias)
        a, labels = torch.randn(4, V + 9) * 3, torch.tensor([V + 8, 9 + V // 2, 0, -1])
        coefficient = torch.tensor([1.5, -0.3, 2.0, 0.0])
        exact, naive = Exact.of(a.double(), labels, head), Exact.of(a, labels, head)
        state = State(4)
        state.fold(a.clone(), labels, head)
        shift = state.lse.float()
        memory = torch.full((4, V + 3), torch.nan)
        block = memory[:, 1 : V + 1].copy_(a[:, 9:])
        native_passes.gradient_(
            block,
            labels,
            head,
            9,
            shift_n=shift,
            softmax_factor_n=(shift - state.lse).exp().float(),
            coefficient_n=coefficient,
        )
        assert memory[:, 0].isnan().all()
        assert memory[:, V + 1 :].isnan().all()
        expected = (t.gradient_nV[:, 9:] * coefficient[:, None].to(t.gradient_nV.dtype) for t in (exact, naive))
        assert_as_near(block, *expected)
        assert block[3].eq(0).all()


def test_exponentials_in_the_whole_range() -> None:
    """To one unit in the last place, denormal results too, and 0 only where float32 has nothing nearer."""
    x = torch.cat([torch.linspace(-110, 0, 300_001), -torch.logspace(-40, 2, 5_000)])
    state, block = State(1), x[None].clone()
    state.fold(block, torch.tensor([-1]), make_head({}, len(x), bias=False), keep=Keep.EXPS)
    exact = x.double().exp()
    unit = (torch.finfo(torch.float32).eps * 2 ** exact.log2().floor()).clamp(min=2.0**-149)
    assert ((block[0] - exact).abs() / unit).max() <= 1.01
    assert state.max.item() == 0


def test_saturated_softcap_keeps_its_slope() -> None:
    """1 - tanh^2 has a relative error, not one of 1."""
    a = torch.linspace(-40, 40, 20_001)
    head = Head(torch.empty(len(a), 0), None, 1.0, 1.0, 1.0)
    for label in range(0, len(a), 997):
        state = State(1)
        state.fold(a[None].clone(), torch.tensor([label]), head)
        exact = 1 / a[label].double().cosh().square()
        assert abs(state.label_factor.double() - exact) <= 1e-6 * exact + 1e-45
        tanh = a[label].double().tanh()
        assert abs(state.label_logit.double() - tanh) <= 2.5e-7 * tanh.abs()


@pytest.mark.parametrize("V", [5, 200])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nan_and_infinities_as_torch(V: int, softcap: float | None) -> None:
    """Rows with nan or +inf have no softmax; -inf masks; a neighbour sees nothing of it."""
    head = make_head({"softcap": softcap}, V, bias=False)
    a = torch.randn(7, V)
    a[1, 3], a[2, 3], a[3, :4], a[4, :], a[5, 2], a[6, 1] = torch.nan, torch.inf, -torch.inf, -torch.inf, 3e38, -3e38
    labels = torch.tensor([1, 3, 0, 4, 2, 1, 1])
    state, block = State(7), a.clone()
    state.fold(block, labels, head, keep=Keep.EXPS_LESS_LABEL)
    expected, exact = Exact.of(a, labels, head), Exact.of(a.double(), labels, head)
    logps = (state.label_logit - state.max) - state.sum.log()
    expected_logps = expected.logits_nV.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, expected_logps, equal_nan=True)
    gradient = block * (-1 / state.sum)[:, None]
    torch.testing.assert_close(gradient.double(), exact.gradient_nV, rtol=1e-5, atol=1e-6, equal_nan=True)
    found = state.stats.finish(state.sum, labels, V)
    stats = token_stats(expected.logits_nV, labels, -100, STATS)
    assert torch.equal(found.isnan()[0], stats.isnan()[0])
    assert torch.equal(found[1], stats[1])


def test_peaked_rows_lose_nothing_at_the_label() -> None:
    """softmax - 1 at the label is the sum of the others, not a difference of two numbers near 1."""
    a = torch.full((3, 50), -20.0)
    labels = torch.tensor([0, 17, 49])
    a[torch.arange(3), labels] = torch.tensor([0.0, 5.0, 60.0])
    state, block = State(3), a.clone()
    state.fold(block, labels, make_head({}, 50, bias=False), keep=Keep.EXPS_LESS_LABEL)
    exact = 49 * (-20 - a.amax(1).double()).exp()
    found = -block[torch.arange(3), labels]
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-38)


def test_first_of_equal_logits_is_the_top() -> None:
    a = torch.zeros(4, 40)
    a[1, 30:] = 1
    a[2, 5], a[2, 21] = 2, 2
    state = State(4)
    for start in (0, 20):
        state.fold(a[:, start : start + 20].clone(), torch.zeros(4, dtype=torch.int64), make_head({}, 40, False), start)
    assert state.stats.top_column_T.tolist() == [0, 30, 5, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[None, :]
    widened = native_passes.convert_(torch.empty(1, 2**16), every)
    torch.testing.assert_close(widened, every.float(), rtol=0, atol=0, equal_nan=True)
    bits = torch.randint(-(2**31), 2**31, (3, 50_001), dtype=torch.int64).to(torch.int32)
    near = torch.cat([widened.view(-1), widened.view(-1).nextafter(torch.tensor(9.0)), torch.randn(999) * 1e-7])
    for values in (bits.view(torch.float32), near[None, :]):
        found = native_passes.convert_(torch.empty(values.shape, dtype=dtype), values)
        torch.testing.assert_close(found, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    factor = torch.tensor([2.5, 0.0, -1.0])
    rows = torch.randn(3, 64).to(dtype)[:, 3:40]
    memory = torch.full((3, 50), torch.nan, dtype=dtype)
    native_passes.convert_(memory[:, 2:39], rows, factor)
    assert torch.equal(memory[:, 2:39], (rows.float() * factor[:, None]).to(dtype))
    assert memory[:, :2].isnan().all()
    assert memory[:, 39:].isnan().all()


def test_threads_and_repetition_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    n, V = 37, 9001
    head = make_head(HEADS["softcap"], V, bias=True)
    a, labels = torch.randn(n, V), torch.randint(0, V, (n,))
    results = []
    for threads in (1, 1, 2, 3, 64):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        state, block, gradient = State(n), a.clone(), a.clone()
        state.fold(block, labels, head, keep=Keep.EXPS_LESS_LABEL)
        rows = {"softmax_factor_n": torch.ones(n), "coefficient_n": torch.ones(n)}
        native_passes.gradient_(gradient, labels, head, 0, shift_n=state.max, **rows)
        converted = native_passes.convert_(torch.empty(n, V, dtype=torch.bfloat16), a)
        results.append([block, gradient, state.sum, state.max, converted.float(), state.stats.entropy_T])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_no_rows() -> None:
    head = make_head({}, 3, bias=True)
    State(0).fold(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), head)
    assert native_passes.convert_(torch.empty(0, 3), torch.empty(0, 3)).shape == (0, 3)
