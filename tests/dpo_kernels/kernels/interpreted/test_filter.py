"""The filtered backward by kernels: kept tiles are exact, the others are neither computed nor read."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch.testing import assert_close

from dpo_kernels import linear_logps
from dpo_kernels.head import Head
from dpo_kernels.kernels.filtered_products import TileLists, add_filtered_dx_, filtered_db, filtered_dw
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_logps import empty_exps, score_rows
from dpo_kernels.linear_logps import reference
from dpo_kernels.linear_logps.ops import linear_logps_backward_op, linear_logps_op
from dpo_kernels.linear_logps.tile_filter import COLUMNS, FILTER_STATS, Kept, kept_elements
from tests.dpo_kernels.kernels.interpreted.twin import IGNORED, Problem, assert_as_good, far_rows, rounding

triton_tiles = importlib.import_module("dpo_kernels.linear_logps.triton_tiles")
ROWS = 64
SMALL = TileConfig(block_n=32, block_v=64, block_d=16, group_n=2, num_warps=4, num_stages=1)
TMA = TileConfig(block_n=32, block_v=64, block_d=16, group_n=2, num_warps=4, num_stages=1, tma=True)
WHOLE = TileConfig(block_n=64, block_v=128, block_d=32, group_n=1, num_warps=4, num_stages=1)
CONFIGS = pytest.mark.parametrize("config", [SMALL, TMA, WHOLE], ids=["small", "tma", "whole"])
LOGIT_ROUNDING = 4e-7 * 35
"""A few rounding units of the largest logits of ``peaked``, which are relative errors of a probability."""
ALL_OPTIONS = {"softcap": 30.0, "logit_scale": 0.9, "temperature": 1.1}


@pytest.fixture(autouse=True)
def narrow_slices(monkeypatch):
    monkeypatch.setattr(triton_tiles, "SLICE_BYTES", 1)
    monkeypatch.setattr(triton_tiles, "MIN_SLICE", 3 * COLUMNS)


def peaked(T: int = 280, D: int = 24, V: int = 900, dtype: torch.dtype = torch.float32):
    """[hidden, weight, bias], labels, which lie in few tiles; half of the rows are certain of theirs."""
    weight, labels = torch.randn(V, D), torch.randint(0, -(-V // 3), (T,))
    certainty = torch.where(torch.rand(T) < 0.5, 1.3, 0.4)
    hidden = certainty[:, None] * weight[labels] + 0.1 * torch.randn(T, D)
    labels[torch.rand(T) < 0.15] = IGNORED
    return [t.to(dtype) for t in (hidden, weight, torch.randn(V))], labels


def run(tensors, labels, upstream, impl="triton", trained=(True, True, True), **options):
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, trained, strict=True)]
    out = linear_logps(leaves[0], leaves[1], labels, bias=leaves[2], impl=impl, stats=FILTER_STATS, **options)
    return out, torch.autograd.grad(out.logps, [t for t in leaves if t.requires_grad], upstream)


def decided(tensors, labels, filter_mass, softcap=None, logit_scale=1.0, temperature=1.0):
    """(log-sum-exps, kept tiles) of the kernels' forward."""
    hidden, weight, bias = tensors
    options = (softcap, logit_scale, temperature, IGNORED, "triton", False, "", None, filter_mass)
    _, lse, _, _, *tiles = linear_logps_op(hidden, weight, labels, bias, *options)
    return lse, Kept(*tiles)


def cut_gradients(tensors, labels, upstream, kept_TV, dtype, softcap=None, logit_scale=1.0, temperature=1.0):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    head = Head(leaves[1], leaves[2], softcap, logit_scale, temperature)
    logps, _ = reference.logps(leaves[0], head, labels, IGNORED, kept_TV)
    return torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["", "all"])
def test_kept_tiles_have_the_exact_gradient(dtype, options):
    tensors, labels = peaked(dtype=dtype)
    upstream = torch.randn(280)
    _, tiles = decided(tensors, labels, 0.01, **options)
    kept_TV = kept_elements(tiles, 900, triton_tiles.FILTER_ROWS)
    assert 0.1 < kept_TV.double().mean() < 0.95
    exact = cut_gradients(tensors, labels, upstream, kept_TV, torch.float64, **options)
    rival = cut_gradients(tensors, labels, upstream, kept_TV, dtype, **options)
    out, found = run(tensors, labels, upstream, filter_mass=0.01, **options)
    assert out.stats["dropped_mass"].max() <= 0.01
    for ours, theirs, truth in zip(found, rival, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, theirs, truth, 4 * rounding(dtype) + LOGIT_ROUNDING)


def test_decides_as_the_definition_does():
    """Blocks of the reference are the kernels', so the two keep the same tiles, but for a mass that rounds apart."""
    tensors, labels = peaked()
    upstream = torch.randn(280)
    for filter_mass in (1e-4, 1e-2):
        (ours, found), (theirs, expected) = (
            run(tensors, labels, upstream, impl, filter_mass=filter_mass) for impl in ("triton", "reference")
        )
        assert_close(ours.stats, theirs.stats, rtol=1e-4, atol=1e-9)
        assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [0, 1, 2, 127, 129])
@pytest.mark.parametrize("V", [1, 129, 385])
def test_no_budget_is_the_exact_gradient(T, V):
    tensors, labels = peaked(T, 17, V)
    upstream = torch.randn(T)
    found = run(tensors, labels, upstream, filter_mass=0.0)
    leaves = [t.requires_grad_() for t in tensors]
    exact = linear_logps(leaves[0], leaves[1], labels, bias=leaves[2], impl="triton")
    assert torch.equal(found[0].logps, exact)
    # Blocks differ, and with them the rounding of the logits: see LOGIT_ROUNDING.
    expected = torch.autograd.grad(exact, leaves, upstream)
    assert_close(found[1], expected, rtol=LOGIT_ROUNDING, atol=LOGIT_ROUNDING * tensors[1].abs().max().item())


@pytest.mark.parametrize("trained", [t for t in itertools.product([True, False], repeat=3) if any(t)])
def test_frozen_inputs(trained):
    tensors, labels = peaked(40, V=500)
    upstream = torch.randn(40)
    everything = run(tensors, labels, upstream, filter_mass=0.01)[1]
    found = run(tensors, labels, upstream, filter_mass=0.01, trained=trained)[1]
    assert_close(found, tuple(itertools.compress(everything, trained)), rtol=0, atol=0)


@pytest.mark.parametrize("strided", [False, True])
def test_adds_to_an_existing_gradient_of_the_weight(strided):
    tensors, labels = peaked(40, V=500, dtype=torch.bfloat16)
    upstream = torch.randn(40)
    expected = run([t.float() for t in tensors], labels, upstream, filter_mass=0.01)[1][1]
    main_grad = torch.ones(24, 500).T if strided else torch.ones(500, 24)
    leaves = [t.requires_grad_() for t in tensors]
    logps = linear_logps(
        leaves[0], leaves[1], labels, bias=leaves[2], impl="triton", filter_mass=0.01, weight_grad=main_grad
    )
    logps.backward(upstream)
    assert leaves[1].grad is None
    assert_close(main_grad, expected + 1, rtol=0.03, atol=0.03)


def test_all_rows_ignored():
    tensors, labels = peaked(5, V=300)
    out, gradients = run(tensors, torch.full_like(labels, IGNORED), torch.ones(5), filter_mass=0.01)
    assert all(t.eq(0).all() for t in (out.logps, *out.stats.values(), *gradients))


def test_flat_softmax_keeps_its_gradient():
    """Every probability is below a threshold of 2^-12, and no tile fits the budget."""
    V = 30 * COLUMNS
    tensors = [torch.zeros(3, 16), torch.zeros(V, 16), 1e-3 * torch.randn(V)]
    labels = torch.tensor([0, V - 1, 777])
    out, found = run(tensors, labels, torch.ones(3), filter_mass=1e-3)
    assert out.stats["kept_tiles"].eq(1).all()
    assert out.stats["dropped_mass"].eq(0).all()
    leaves = [t.requires_grad_() for t in tensors]
    exact = linear_logps(leaves[0], leaves[1], labels, bias=leaves[2], impl="triton")
    assert_close(found, torch.autograd.grad(exact.sum(), leaves), rtol=1e-5, atol=1e-9)


def test_what_is_left_out_is_never_read():
    """Columns that no block keeps, and hidden states of blocks that keep nothing, hold nan in backward."""
    tensors, labels = peaked(300)
    labels[:150] = IGNORED
    lse, tiles = decided(tensors, labels, 0.01)
    # Ignored rows stand in the last places: the third block has none but such.
    assert not tiles.kept_BC[2].any()
    tiles.kept_BC[:, 2] = False
    tiles.kept_BC[:, 5] = False

    def backward():
        options = (None, 1.0, 1.0, IGNORED, "triton", True, True, True)
        return linear_logps_backward_op(torch.ones(300), *tensors[:2], labels, lse, tensors[2], *options, *tiles)

    expected = backward()
    for tile in (2, 5):
        columns = slice(tile * COLUMNS, (tile + 1) * COLUMNS)
        tensors[1][columns], tensors[2][columns] = torch.nan, torch.nan
        assert expected[1][columns].eq(0).all()
    tensors[0][tiles.order_T[256:]] = torch.nan
    assert_close(backward(), expected, rtol=0, atol=0)


def test_two_runs_are_bitwise_equal():
    tensors, labels = peaked(140, V=500, dtype=torch.bfloat16)
    upstream = torch.randn(140)
    (a, first), (b, second) = (run(tensors, labels, upstream, filter_mass=0.01) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip((*a, *first), (*b, *second), strict=True) if torch.is_tensor(x))
    assert all(torch.equal(a.stats[name], b.stats[name]) for name in FILTER_STATS)


@pytest.mark.parametrize("scale", [1.0, 2000.0])
@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
def test_masses_are_those_of_the_softmax(config, scale):
    problem = Problem.make(19, 300, bias=True, scale=scale)
    problem.head.bias_V[:140] = -torch.inf
    stats = problem.stats(config, mass_columns=COLUMNS)
    z = problem.hidden.double() @ problem.weight.double().T + problem.head.bias_V.double()
    used = problem.labels != IGNORED
    others = torch.nn.functional.one_hot(problem.labels.clamp(min=0), 300) == 0
    p = z.softmax(-1) * others
    expected = torch.stack([part.sum(-1) for part in p.split(COLUMNS, dim=1)], dim=1)
    known = used & (problem.labels >= 140)
    assert_close(stats.mass_TC[known].double(), expected[known], rtol=1e-4 if scale == 1 else 5e-2, atol=1e-12)


class Slice:
    """A gradient of which only kept tiles were written, in a buffer of whole tiles."""

    def __init__(self, N: int, V: int, D: int, dtype: torch.dtype = torch.float32, first_tile: int = 2):
        kept = torch.rand(-(-N // ROWS), first_tile + -(-V // COLUMNS) + 1) < 0.5
        self.lists = TileLists.make(kept, rows=ROWS, columns=COLUMNS)
        self.first_col = first_tile * COLUMNS
        kept_TV = kept[:, first_tile:].repeat_interleave(ROWS, 0)[:N].repeat_interleave(COLUMNS, 1)
        width = -(-V // COLUMNS) * COLUMNS
        dense = torch.randn(N, width).to(dtype)
        dense[:, V:] = 0
        self.grad = dense.masked_fill(~kept_TV[:, :width], torch.nan)[:, :V]
        self.exact = dense.masked_fill(~kept_TV[:, :width], 0)[:, :V].double()
        self.hidden, self.weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)


SIZES = pytest.mark.parametrize(("N", "V", "D"), [(1, 1, 1), (64, 128, 16), (150, 300, 40), (129, 257, 23)])


@CONFIGS
@SIZES
def test_products(N, V, D, config):
    case = Slice(N, V, D)
    before = torch.randn(N, D)
    dX = before.clone()
    add_filtered_dx_(dX, case.grad, case.weight, case.lists, first_col=case.first_col, config=config)
    assert_close(dX.double(), before + case.exact @ case.weight.double(), rtol=1e-5, atol=1e-4)
    dW, expected = torch.full((V, D), torch.nan), case.exact.T @ case.hidden.double()
    filtered_dw(dW, case.grad, case.hidden, case.lists, first_col=case.first_col, accumulate=False, config=config)
    assert_close(dW.double(), expected, rtol=1e-5, atol=1e-4)
    strided = torch.ones(D, V).T
    filtered_dw(strided, case.grad, case.hidden, case.lists, first_col=case.first_col, accumulate=True, config=config)
    assert_close(strided.double(), expected + 1, rtol=1e-5, atol=1e-4)
    db = torch.full((V,), torch.nan)
    filtered_db(db, case.grad, case.lists, first_col=case.first_col)
    assert_close(db.double(), case.exact.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits(dtype):
    """Summed in fp32: nothing is rounded before the end."""
    case = Slice(150, 300, 40, dtype, first_tile=0)
    dX = torch.full((150, 40), torch.nan)
    add_filtered_dx_(dX, case.grad, case.weight, case.lists, first_col=0, config=SMALL)
    assert_close(dX.double(), case.exact @ case.weight.double(), rtol=1e-5, atol=1e-4)
    dW = torch.ones(300, 40)
    filtered_dw(dW, case.grad, case.hidden, case.lists, first_col=0, accumulate=True, config=SMALL)
    assert_close(dW.double(), 1 + case.exact.T @ case.hidden.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, TMA], ids=["small", "tma"])
def test_gradient_of_kept_tiles_alone_is_written(config):
    """In whole tiles, 0 past the last column."""
    problem = Problem.make(150, 300, 16)
    lse = score_rows(problem.hidden, problem.head, problem.labels, ignore_index=IGNORED).lse_T
    kept = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    lists = TileLists.make(kept, rows=ROWS, columns=COLUMNS)
    buffer, upstream = empty_exps(problem.hidden, 300).fill_(torch.nan), torch.randn(150)
    slice_grad(
        problem.hidden, problem.head, problem.labels, lse, upstream, buffer, first_col=0, lists=lists,
        ignore_index=IGNORED, config=config,
    )  # fmt: skip
    buffer = buffer[:150, :384]
    kept_TV = kept.repeat_interleave(ROWS, 0)[:150].repeat_interleave(COLUMNS, 1)
    assert buffer[~kept_TV].isnan().all()
    assert buffer[:, 300:][kept_TV[:, 300:]].eq(0).all()
    exact = problem.product_gradient(upstream)
    inside = kept_TV[:, :300]
    assert_close(buffer[:, :300][inside].double(), exact[inside], rtol=1e-4, atol=1e-6)


def test_offsets_past_two_to_the_31():
    """Later rows of the gradient, of hidden states and of the weight lie beyond 2^31 elements."""
    case = Slice(70, 64, 16, torch.float16, first_tile=0)
    case.lists = TileLists.make(torch.ones(2, 1, dtype=torch.bool), rows=ROWS, columns=COLUMNS)
    far = [far_rows(rows, columns, 2**31 // (rows - 2)) for rows, columns in ((70, 128), (70, 16), (64, 16))]
    far[0].zero_()
    far[0][:, :64] = torch.randn(70, 64)
    far[1].copy_(case.hidden)
    far[2].copy_(case.weight)
    grad, hidden, weight = far[0][:, :64], *far[1:]
    dX, dW = torch.empty(70, 16), torch.empty(64, 16)
    add_filtered_dx_(dX, grad, weight, case.lists, first_col=0, config=SMALL)
    filtered_dw(dW, grad, hidden, case.lists, first_col=0, accumulate=False, config=SMALL)
    assert_close(dX.double(), grad.double() @ case.weight.double(), rtol=1e-4, atol=1e-3)
    assert_close(dW.double(), grad.double().T @ case.hidden.double(), rtol=1e-4, atol=1e-3)
