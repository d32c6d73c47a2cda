"""Gradients by the kernels against autograd of the reference in float64."""

from __future__ import annotations

import pytest
import torch

from dpo_kernels.head import Head
from dpo_kernels.kernels.frozen_head import frozen_head
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_logps import empty_exps
from tests.dpo_kernels.kernels.interpreted.twin import IGNORED, Problem, assert_as_good, far_rows, rounding

SMALL = TileConfig(block_n=32, block_v=64, block_d=16, group_n=2, num_warps=4, num_stages=1)
WIDE = TileConfig(block_n=16, block_v=256, block_d=32, group_n=3, num_warps=4, num_stages=1)
ALL_OPTIONS = {"softcap": 3.0, "logit_scale": 0.5, "temperature": 0.7}


def in_place(problem: Problem, upstream: torch.Tensor, config: TileConfig = SMALL) -> torch.Tensor:
    """The gradient that starts from the exponentials of the forward pass."""
    V = problem.weight.shape[0]
    exps = empty_exps(problem.hidden, V)
    stats = problem.stats(config, exps=exps)
    return softmax_grad_(exps, upstream, problem.head, problem.labels, stats, ignore_index=IGNORED)


def recomputed(problem: Problem, upstream: torch.Tensor, config: TileConfig = SMALL, width: int = 128) -> torch.Tensor:
    """The gradient by slices, from the log-sum-exp alone."""
    V = problem.weight.shape[0]
    common = {"ignore_index": IGNORED, "config": config}
    lse = problem.stats(config).lse_T
    out = torch.full((len(problem.labels), V), torch.nan, dtype=problem.hidden.dtype)
    buffer = empty_exps(problem.hidden, min(V, width)).fill_(torch.nan)
    for start in range(0, V, width):
        columns = slice(start, min(V, start + width))
        slice_grad(
            problem.hidden,
            problem.head.columns(columns),
            problem.labels,
            lse,
            upstream,
            buffer,
            first_col=start,
            **common,
        )
        out[:, columns] = buffer[: len(out), : columns.stop - columns.start]
    return out


def naive(problem: Problem, upstream: torch.Tensor) -> torch.Tensor:
    """Same-dtype torch: what autograd gives when logits are rounded to the compute dtype."""
    head = problem.head
    products = (problem.hidden @ problem.weight.T).detach().requires_grad_()
    z = products if head.bias_V is None else products + head.bias_V
    z = z * head.logit_scale
    z = (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)) / head.temperature
    ignored = problem.labels == IGNORED
    logps = z.float().log_softmax(1).gather(1, problem.labels.masked_fill(ignored, 0)[:, None])[:, 0]
    return torch.autograd.grad((logps.masked_fill(ignored, 0) * upstream).sum(), products)[0]


def compare(method, problem: Problem, upstream: torch.Tensor | None = None, **arguments) -> torch.Tensor:
    upstream = torch.randn(len(problem.labels)) if upstream is None else upstream
    got = method(problem, upstream, **arguments)
    assert got.dtype == problem.hidden.dtype
    assert (got[problem.labels == IGNORED] == 0).all()
    exact = problem.product_gradient(upstream)
    assert_as_good(got, naive(problem, upstream), exact, 2 * rounding(problem.hidden.dtype) + 1e-6)
    return got


METHODS = pytest.mark.parametrize("method", [in_place, recomputed])


@METHODS
@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
def test_vocabularies(method, V, config):
    compare(method, Problem.make(19, V), config=config)


@METHODS
@pytest.mark.parametrize("N", [1, 2, 127, 129])
def test_rows(method, N):
    compare(method, Problem.make(N, 130))


@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["", "all"])
def test_dtypes_and_options(method, dtype, options):
    compare(method, Problem.make(21, 150, 40, dtype, bias=bool(options), **options))


@METHODS
def test_ignored_rows_are_zero_even_where_nothing_is_finite(method):
    problem = Problem.make(9, 70, ignored=False)
    clean = compare(method, problem, torch.ones(9))
    problem.labels[4] = IGNORED
    problem.hidden[4] = torch.nan
    upstream = torch.ones(9)
    upstream[4] = torch.nan
    got = method(problem, upstream)
    others = torch.arange(9) != 4
    assert torch.equal(got[others], clean[others])
    assert (got[4] == 0).all()


@METHODS
def test_all_rows_ignored(method):
    problem = Problem.make(5, 70)
    problem.labels[:] = IGNORED
    assert (compare(method, problem) == 0).all()


@METHODS
def test_extreme_logits(method):
    compare(method, Problem.make(9, 150, scale=2000.0, ignored=False))


@METHODS
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_all_logits_far_from_zero(method, shift):
    problem = Problem.make(5, 150)
    problem.set_bias(torch.full((150,), shift))
    # At 1e4 a logit has an absolute rounding error of 1e-3, and the gradient the same relative one.
    upstream = torch.randn(5)
    torch.testing.assert_close(
        method(problem, upstream).double(), problem.product_gradient(upstream), rtol=4e-3, atol=1e-6
    )


@METHODS
def test_columns_switched_off(method):
    problem = Problem.make(5, 200, ignored=False)
    bias = torch.zeros(200)
    bias[:130] = -torch.inf
    problem.set_bias(bias)
    problem.labels = torch.tensor([130, 150, 199, 170, 131])
    got = compare(method, problem)
    assert (got[:, :130] == 0).all()


def test_confident_rows_keep_their_gradient():
    """1 - p[label] of a row with p[label] = 1 - 1e-6 has all its digits, even in bfloat16."""
    hidden = torch.eye(2, dtype=torch.bfloat16)
    weight = torch.tensor([[13.8, 0.0], [0.0, 13.8]], dtype=torch.bfloat16)
    problem = Problem(hidden, Head(weight), torch.tensor([0, 1]))
    got = in_place(problem, torch.ones(2))
    torch.testing.assert_close(got.double(), problem.product_gradient(torch.ones(2)), rtol=0.01, atol=0)


@METHODS
def test_two_runs_are_bitwise_equal(method):
    problem, upstream = Problem.make(20, 200, dtype=torch.bfloat16, softcap=5.0), torch.randn(20)
    assert torch.equal(method(problem, upstream), method(problem, upstream))


def test_slice_gradient_offsets_past_two_to_the_31():
    problem, upstream = Problem.make(32, 64, 16, torch.float16), torch.randn(32)
    far = far_rows(32, 64, 2**31 // 30)
    lse = problem.reference(torch.float32)[1].detach()
    slice_grad(
        problem.hidden,
        problem.head,
        problem.labels,
        lse,
        upstream,
        far,
        first_col=0,
        ignore_index=IGNORED,
        config=SMALL,
    )
    torch.testing.assert_close(far.double(), problem.product_gradient(upstream), rtol=2e-3, atol=1e-5)


def frozen(problem: Problem, slice_columns: int, config: TileConfig = SMALL):
    return frozen_head(
        problem.hidden,
        problem.head,
        problem.labels,
        slice_columns=slice_columns,
        ignore_index=IGNORED,
        config=config,
    )


def compare_frozen(problem: Problem, slice_columns: int, config: TileConfig = SMALL):
    got = frozen(problem, slice_columns, config)
    logps, lse, hidden, *_ = problem.reference()
    (dx,) = torch.autograd.grad(logps.sum(), hidden)
    rival_logps, rival_lse, rival_hidden, *_ = problem.reference(torch.float32)
    (rival_dx,) = torch.autograd.grad(rival_logps.sum(), rival_hidden)
    scale = max(1, lse.detach().abs().max().item())
    assert_as_good(got.logps_T, rival_logps.detach(), logps.detach(), 4e-7 * scale)
    assert_as_good(got.lse_T, rival_lse.detach(), lse.detach(), 4e-7)
    assert got.dx_TD.dtype == problem.hidden.dtype
    assert_as_good(got.dx_TD, rival_dx, dx, 3 * rounding(problem.hidden.dtype) + 1e-6 * scale)
    assert (got.dx_TD[problem.labels == IGNORED] == 0).all()
    return got


@pytest.mark.parametrize("slice_columns", [64, 128, 1024])
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
def test_frozen_head(slice_columns, config):
    compare_frozen(Problem.make(19, 300), slice_columns, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["", "all"])
def test_frozen_head_dtypes_and_options(dtype, options):
    compare_frozen(Problem.make(13, 150, 40, dtype, bias=bool(options), **options), 64)


@pytest.mark.parametrize("V", [1, 2, 129])
def test_frozen_head_small_vocabularies(V):
    compare_frozen(Problem.make(5, V), 128)


@pytest.mark.parametrize("step", [5.0, 40.0, 300.0, -300.0])
def test_frozen_head_when_each_slice_outgrows_the_last(step):
    """Shifts within the slack stay, larger ones move rows and tiles; falling ones underflow to exact zeros."""
    problem = Problem.make(7, 256, ignored=False)
    problem.set_bias(torch.arange(256).div(64, rounding_mode="floor") * step)
    problem.labels = torch.tensor([0, 70, 130, 200, 255, 63, 192])
    compare_frozen(problem, 64)


def test_frozen_head_confident_rows():
    """(1 - p) W[label] must not come out of a difference of bfloat16 numbers."""
    hidden = torch.eye(2, dtype=torch.bfloat16)
    weight = torch.tensor([[9.0, 0.5], [0.25, 11.0], [0.0, 0.0]], dtype=torch.bfloat16)
    problem = Problem(hidden, Head(weight), torch.tensor([0, 1]))
    got = frozen(problem, 128)
    logps, _, leaf, *_ = problem.reference()
    (dx,) = torch.autograd.grad(logps.sum(), leaf)
    torch.testing.assert_close(got.dx_TD.double(), dx, rtol=0.03, atol=0)


def test_frozen_head_two_runs_are_bitwise_equal():
    problem = Problem.make(20, 200, dtype=torch.bfloat16)
    first, second = frozen(problem, 64), frozen(problem, 64)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("saturation", [2.0, 4.0, 6.0])
def test_slopes_of_a_saturated_softcap(saturation):
    """1 - tanh^2 near 1e-3: from the tanh, once rounded to a logit, it would have three times torch's error."""
    cap = 5.0
    problem = Problem.make(16, 512, 16, scale=cap * saturation / 4, softcap=cap, ignored=False)
    upstream = torch.ones(16)
    exact, found = problem.product_gradient(upstream), recomputed(problem, upstream)
    rival = naive(problem, upstream)
    assert (found - exact).norm() <= 2 * (rival - exact).norm()
