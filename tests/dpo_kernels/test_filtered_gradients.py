"""Gradients of the filtered backward: what is kept is exact, what is left out is bounded and not computed."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import TEST_SHAPES, HeadShape
from dpo_kernels import linear_logps
from dpo_kernels.head import Head, Needs
from dpo_kernels.linear_logps import reference, tile_filter, torch_chunks
from dpo_kernels.linear_logps.interface import Want
from dpo_kernels.linear_logps.ops import linear_logps_backward_op, linear_logps_op
from dpo_kernels.linear_logps.tile_filter import COLUMNS, FILTER_STATS, Kept, kept_elements, plan_filter
from tests.dpo_kernels.filter_setup import ALL_OPTIONS, IGNORED, IMPLS, MODULES, peaked, run


def distribution(logits: torch.Tensor, labels: list[int]):
    """hidden, weight, labels, bias of rows that all have these logits, as the bias."""
    T, V = len(labels), len(logits)
    return torch.zeros(T, 1).to(logits), torch.zeros(V, 1).to(logits), torch.tensor(labels), logits


def tiles_of(hidden, weight, labels, bias, impl, filter_mass, softcap=None, logit_scale=1.0, temperature=1.0) -> Kept:
    """What the forward of an implementation decides to keep."""
    options = (softcap, logit_scale, temperature, IGNORED, impl, False, "", None, filter_mass)
    return Kept(*linear_logps_op(hidden, weight, labels, bias, *options)[-2:])


def masked_gradients(hidden, weight, labels, bias, upstream, kept_TV, softcap=None, logit_scale=1.0, temperature=1.0):
    """Autograd through all logits, whose gradient is cut where kept_TV is False."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    head = Head(leaves[1], leaves[2], softcap, logit_scale, temperature)
    logps, _ = reference.logps(leaves[0], head, labels, IGNORED, kept_TV)
    return torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filter_mass", [1e-6, 1e-3, 0.05])
@pytest.mark.parametrize("impl", IMPLS)
def test_kept_tiles_have_the_exact_gradient(impl, filter_mass, dtype, options) -> None:
    """Nothing else has one: error against float64 with the same tiles cut at most twice that of same-dtype torch."""
    inputs = peaked(dtype=dtype)
    upstream = torch.randn(150)
    tiles = tiles_of(*inputs, impl, filter_mass, **options)
    kept_TV = kept_elements(tiles, 900, MODULES[impl].FILTER_ROWS)
    assert 0 < kept_TV.double().mean() < 1
    hidden, weight, labels, bias = inputs
    raised = (hidden.double(), weight.double(), labels, bias.double())
    exact = masked_gradients(*raised, upstream, kept_TV, **options)
    rival = masked_gradients(*inputs, upstream, kept_TV, **options)
    _, found = run(*inputs, upstream, impl=impl, filter_mass=filter_mass, **options)
    for truth, theirs, ours in zip(exact, rival, found, strict=True):
        assert ours.dtype == dtype
        # In float64 the truth has rounding errors of its own.
        unit = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + unit


@pytest.mark.parametrize("filter_mass", [0.0, 1e-9, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("impl", IMPLS)
def test_bound(impl: str, filter_mass: float) -> None:
    """With the identity as weight dX is the gradient of the logits: off by |g| times the mass that is reported."""
    V = 6 * COLUMNS + 5
    labels = torch.randint(0, V, (40,))
    labels[::9] = IGNORED
    logits = 4 * torch.randn(40, V, dtype=torch.float64)
    upstream = torch.randn(40, dtype=torch.float64)
    eye = torch.eye(V, dtype=torch.float64)
    _, (exact, _) = run(logits, eye, labels, upstream=upstream, impl=impl)
    out, (found, _) = run(logits, eye, labels, upstream=upstream, impl=impl, filter_mass=filter_mass)
    dropped = out.stats["dropped_mass"]
    assert dropped.max() <= filter_mass
    assert dropped[labels == IGNORED].eq(0).all()
    assert_close((found - exact).abs().sum(dim=1), upstream.abs() * dropped, rtol=1e-9, atol=1e-12)
    if filter_mass == 0.3 and impl == "torch":
        assert 0 < out.stats["kept_tiles"].mean() < 0.9
        assert dropped.max() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_bound_on_the_gradients(impl: str) -> None:
    """What the docstring of ``linear_logps`` says of the gradient of a hidden state, with a slope that is not 1."""
    hidden, weight, labels, bias = peaked()
    options = {"logit_scale": -1.7, "temperature": 0.8, "softcap": 20.0}
    upstream = torch.randn(150, dtype=torch.float64)
    _, exact = run(hidden, weight, labels, bias, upstream, impl=impl, **options)
    out, found = run(hidden, weight, labels, bias, upstream, impl=impl, filter_mass=0.05, **options)
    slope, dropped_T = 1.7 / 0.8, out.stats["dropped_mass"] * upstream.abs()
    error_T = (found[0] - exact[0]).norm(dim=1)
    assert error_T.max() > 1e-4
    assert (error_T <= slope * dropped_T * weight.norm(dim=1).max() + 1e-12).all()
    assert (found[1] - exact[1]).norm() <= slope * (dropped_T * hidden.norm(dim=1)).sum()
    assert (found[2] - exact[2]).abs().sum() <= slope * dropped_T.sum()


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_flat_softmax_keeps_its_gradient(impl: str, spread: float) -> None:
    """Every probability is below CCE's threshold for bfloat16, 2^-12, but for the label's nothing would be left."""
    V = 160 * COLUMNS
    logits = spread * torch.randn(V, dtype=torch.float64)
    inputs = distribution(logits, [0, V - 1, 77, 5000])
    assert logits.softmax(0).max() < (2.0**-12 if spread < 1 else 1)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    _, exact = run(*inputs, upstream, impl=impl)
    out, found = run(*inputs, upstream, impl=impl, filter_mass=1e-3)
    assert out.stats["kept_tiles"].eq(1).all()
    assert out.stats["dropped_mass"].eq(0).all()
    assert_close(found, exact, rtol=1e-9, atol=1e-15)
    # A budget of 100 thresholds is one of mass all the same.
    out, found = run(*inputs, upstream, impl=impl, filter_mass=0.1)
    assert out.stats["kept_tiles"].min() >= 0.85
    assert out.stats["dropped_mass"].max() <= 0.1
    assert (found[2] - exact[2]).abs().sum() <= 0.1 * upstream.abs().sum() + 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_tiles_just_below_the_budget_do_not_go_together(impl: str) -> None:
    """Sixty tiles of 0.9 budgets each: one may go."""
    tiles, filter_mass = 61, 1e-2
    mass = torch.full((tiles,), 0.9 * filter_mass, dtype=torch.float64)
    mass[0] = 1 - mass[1:].sum()
    logits = (mass / COLUMNS).log().repeat_interleave(COLUMNS)
    out, _ = run(*distribution(logits, [3] * 5), impl=impl, filter_mass=filter_mass)
    assert_close(out.stats["kept_tiles"], torch.full((5,), 60 / 61, dtype=torch.float64))
    assert_close(out.stats["dropped_mass"], torch.full((5,), 0.9 * filter_mass, dtype=torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
def test_label_in_a_tile_that_weighs_nothing(impl: str) -> None:
    """Its tile is kept, so the gradient of an unlikely label, the largest there is, is exact."""
    V = 12 * COLUMNS
    logits = torch.full((V,), -60.0, dtype=torch.float64)
    logits[5] = 0.0
    for label in (7 * COLUMNS, 8 * COLUMNS - 1, V - 1):
        inputs = distribution(logits, [label, 5, IGNORED])
        _, exact = run(*inputs, impl=impl)
        out, found = run(*inputs, impl=impl, filter_mass=1e-6)
        assert_close(found[2], exact[2], rtol=0, atol=1e-6)
        assert found[2][label] > 1 - 1e-9
        together = impl == "reference"
        assert_close(out.stats["kept_tiles"][:2].double() * 12, torch.tensor([2.0, 2.0 if together else 1.0]).double())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", TEST_SHAPES, ids=str)
def test_no_budget_is_the_exact_gradient(shape: HeadShape, impl: str) -> None:
    T, D, V = shape
    labels = torch.randint(0, V, (T,))
    labels[1::5] = IGNORED
    inputs = (torch.randn(T, D), torch.randn(V, D) / D**0.5, labels, torch.randn(V))
    upstream = torch.randn(T)
    raised = [t.double() if t.is_floating_point() else t for t in inputs]
    truth, exact = run(*raised, upstream, impl="reference", **ALL_OPTIONS)
    plain, rival = run(*inputs, upstream, impl=impl, **ALL_OPTIONS)
    out, found = run(*inputs, upstream, impl=impl, filter_mass=0.0, **ALL_OPTIONS)
    assert out.stats["dropped_mass"].eq(0).all()
    for ours, theirs, value in zip((out.logps, *found), (plain.logps, *rival), (truth.logps, *exact), strict=True):
        if value.numel():
            unit = 4 * torch.finfo(torch.float32).eps * value.abs().max()
            assert (ours - value).abs().max() <= 2 * (theirs - value).abs().max() + unit


def test_what_is_left_out_is_never_read() -> None:
    """Columns that no row keeps hold nan in backward, and so do rows that keep nothing."""
    hidden, weight, labels, bias = peaked(T=20, dtype=torch.float32)
    labels[:4] = IGNORED
    tiles = tiles_of(hidden, weight, labels, bias, "torch", 0.05)
    tiles.kept_BC[:, 2] = False
    _, lse, *_ = linear_logps_op(hidden, weight, labels, bias, None, 1.0, 1.0, IGNORED, "torch", False, "")
    arguments = (torch.ones(20), hidden, weight, labels, lse, bias, None, 1.0, 1.0, IGNORED, "torch", True, True, True)
    expected = linear_logps_backward_op(*arguments, *tiles)
    for gone in (weight[2 * COLUMNS : 3 * COLUMNS], bias[2 * COLUMNS : 3 * COLUMNS], hidden[:4], lse[:4]):
        gone.fill_(torch.nan)
    found = linear_logps_backward_op(*arguments, *tiles)
    assert_close(found, expected, rtol=0, atol=0)
    assert found[1][2 * COLUMNS : 3 * COLUMNS].eq(0).all()


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[0 if name == "mm" else 1 :][:2]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        assert name not in ("bmm", "baddbmm", "matmul", "einsum", "dot", "mv")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("filter_mass", [0.0, 1e-4, 1e-2])
def test_work_is_one_and_three_s_products(filter_mass: float) -> None:
    """2 s with a frozen head; counted from the products themselves."""
    hidden, weight, labels, bias = peaked(V=8 * COLUMNS, dtype=torch.float32)
    head = Head(weight, bias)
    one = 2 * hidden.numel() * len(weight)
    used = labels != IGNORED
    with Products() as forward:
        want = Want(tile_mass=True)
        _, lse, *_, mass = torch_chunks.forward(hidden, head, labels, ignore_index=IGNORED, want=want)
    # Ignored rows are left out of the forward product, too.
    assert forward.flop == one * used.double().mean()
    plan = plan_filter(mass, labels, ignore_index=IGNORED, filter_mass=filter_mass, rows=1)
    s = tile_filter.filter_stats(plan, FILTER_STATS, torch.float64)["kept_tiles"].mean().item()
    for needs, products in (((True, True, True), 3), ((True, False, False), 2), ((False, True, False), 2)):
        arguments = (torch.ones(150), hidden, head, labels, lse.double())
        with Products() as backward:
            torch_chunks.backward(*arguments, ignore_index=IGNORED, needs=Needs(*needs, tiles=plan.kept))
        assert backward.flop == pytest.approx(products * s * one, rel=1e-9)
    assert s < (0.5 if filter_mass > 1e-3 else 0.9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_frozen_inputs_get_no_gradient(impl: str, trained) -> None:
    inputs = peaked()
    upstream = torch.randn(150).double()
    _, expected = run(*inputs, upstream, impl=impl, filter_mass=1e-2)
    hidden, weight, labels, bias = inputs
    leaves = [t.requires_grad_(need) for t, need in zip((hidden, weight, bias), trained, strict=True)]
    linear_logps(hidden, weight, labels, bias=bias, impl=impl, filter_mass=1e-2).backward(upstream)
    for leaf, need, gradient in zip(leaves, trained, expected, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("impl", IMPLS)
def test_adds_to_an_existing_gradient_of_the_weight(impl: str) -> None:
    hidden, weight, labels, bias = peaked(dtype=torch.bfloat16)
    _, expected = run(*(t.float() if t.is_floating_point() else t for t in (hidden, weight, labels, bias)),
                      impl=impl, filter_mass=1e-2)  # fmt: skip
    main_grad = torch.ones(24, 900).T
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    linear_logps(hidden, weight, labels, bias=bias, impl=impl, filter_mass=1e-2, weight_grad=main_grad).sum().backward()
    assert leaves[1].grad is None
    assert_close(main_grad, expected[1] + 1, rtol=2e-3, atol=2e-3)
