"""``filter_mass`` as an option of ``linear_logps``: its report, errors, autocast, registration and compilation."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck
from torch.testing import assert_close

from dpo_kernels import describe, dispatch, linear_logps
from dpo_kernels.linear_logps.ops import (
    linear_logps_backward_accumulate_op,
    linear_logps_backward_op,
    linear_logps_op,
)
from tests.dpo_kernels.filter_setup import IGNORED, IMPLS, peaked, run
from tests.dpo_kernels.native_setup import NATIVE


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_row_and_no_row_that_counts(impl: str, num_rows: int) -> None:
    inputs = (torch.randn(num_rows, 5), torch.randn(300, 5), torch.full((num_rows,), IGNORED), torch.randn(300))
    out, gradients = run(*inputs, impl=impl, filter_mass=1e-3)
    assert all(t.eq(0).all() for t in (out.logps, *out.stats.values(), *gradients))
    assert [g.shape for g in gradients] == [inputs[0].shape, inputs[1].shape, inputs[3].shape]


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_have_the_same_bits(impl: str) -> None:
    inputs = peaked(dtype=torch.bfloat16)
    upstream = torch.randn(150)
    (a, first), (b, second) = (run(*inputs, upstream, impl=impl, filter_mass=1e-3) for _ in range(2))
    for x, y in zip((a.logps, *a.stats.values(), *first), (b.logps, *b.stats.values(), *second), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_of_both_kinds(impl: str) -> None:
    """In the order asked for, each as without the other; log-probs as without a filter, and no gradient in any."""
    hidden, weight, labels, bias = peaked()
    hidden.requires_grad_()
    names = ("kept_tiles", "entropy", "dropped_mass", "is_top1")
    out = linear_logps(hidden, weight, labels, bias=bias, impl=impl, filter_mass=1e-2, stats=names)
    assert tuple(out.stats) == names
    assert not any(t.requires_grad for t in out.stats.values())
    plain = linear_logps(hidden, weight, labels, bias=bias, impl=impl, stats=("entropy", "is_top1"))
    assert_close(out.logps, plain.logps)
    assert_close({n: out.stats[n] for n in plain.stats}, plain.stats)
    _, (dX, *_) = run(hidden, weight, labels, bias, impl=impl, filter_mass=1e-2)
    assert_close(torch.autograd.grad(out.logps.sum(), hidden)[0], dX)


def test_without_a_gradient_nothing_is_planned(monkeypatch) -> None:
    hidden, weight, labels, _ = peaked()
    ops = importlib.import_module("dpo_kernels.linear_logps.ops")
    monkeypatch.setattr(ops, "plan_filter", None)
    with torch.no_grad():
        weight.requires_grad_()
        found = linear_logps(hidden, weight, labels, filter_mass=1e-3)
    assert torch.equal(found, linear_logps(hidden, weight, labels))


def test_under_autocast_and_in_strided_memory() -> None:
    hidden, weight, labels, bias = peaked(dtype=torch.float32)
    low = [t.bfloat16() if t.is_floating_point() else t for t in (hidden, weight, labels, bias)]
    expected = run(*low, impl="torch", filter_mass=1e-2)
    wide = torch.stack([hidden, hidden], dim=2)[:, :, 0]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(wide, weight, labels, bias, impl="torch", filter_mass=1e-2)
    assert_close(found[0].stats, expected[0].stats, rtol=0, atol=0)
    assert_close(found[1], [t.float() for t in expected[1]], rtol=0, atol=0)


def test_double_backward_raises() -> None:
    hidden, weight, labels, _ = peaked(T=9)
    logps = linear_logps(hidden.requires_grad_(), weight, labels, filter_mass=1e-3)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_rows", [0, 11, 140])
def test_opcheck(num_rows: int, impl: str) -> None:
    hidden, weight, labels, bias = peaked(num_rows, dtype=torch.float32)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    options = (30.0, 1.5, 0.8, IGNORED, impl)
    arguments = (
        leaves[0],
        leaves[1],
        labels,
        leaves[2],
        *options,
        False,
        "dropped_mass,is_top1,kept_tiles",
        None,
        0.01,
    )
    opcheck(linear_logps_op, arguments)
    _, lse, _, _, order, kept = linear_logps_op(*arguments)
    saved = (torch.randn(num_rows), hidden, weight, labels, lse, bias, *options)
    opcheck(linear_logps_backward_op, (*saved, True, True, True, order, kept))
    opcheck(linear_logps_backward_accumulate_op, (torch.zeros(900, 24), *saved, True, True, order, kept))


def test_compiles_whole_with_dynamic_lengths() -> None:
    def function(hidden, weight, labels):
        out = linear_logps(hidden, weight, labels, softcap=30.0, filter_mass=1e-2, stats=("dropped_mass", "entropy"))
        return (out.logps * 1.5).sum(), out.stats["dropped_mass"].max(), out.stats["entropy"]

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for num_rows in (30, 141, 12):
        hidden, weight, labels, _ = peaked(num_rows, dtype=torch.float32)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        found, expected = compiled(hidden, weight, labels), function(hidden, weight, labels)
        assert_close(found, expected)
        assert_close(*(torch.autograd.grad(out[0], leaves) for out in (found, expected)))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filter_mass": -0.1}, r"filter_mass must be in \[0, 1\), or None for the exact gradient; got -0.1"),
        ({"filter_mass": 1.0}, "got 1.0"),
        ({"filter_mass": float("nan")}, "got nan"),
        ({"stats": ("kept_tiles",)}, "stats kept_tiles tell what filter_mass leaves out; got filter_mass=None"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logps(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), **change)


def test_a_gpu_without_kernels_is_refused(monkeypatch) -> None:
    """Torch can leave out a product only where it knows the numbers of rows, which would wait for the device."""
    why_not = dispatch.why_not
    monkeypatch.setattr(
        dispatch, "why_not", lambda op, impl, *rest: "too old" if impl == "triton" else why_not(op, impl, *rest)
    )
    arguments = ("cuda", torch.bfloat16, (), True)
    for impl in ("auto", "torch"):
        with pytest.raises(RuntimeError, match="would wait for the GPU"):
            dispatch.choose("linear_logps", impl, *arguments)
    on_cpu = NATIVE[0] if NATIVE else "torch"
    assert dispatch.choose("linear_logps", "auto", "cpu", torch.float32, (), True).impl == on_cpu
    found = describe("cuda", torch.bfloat16)
    assert (found.linear_logps.impl, found.linear_logps_filtered.impl) == ("torch", "none")
    assert "linear_logps with filter_mass: none (linear_logps cannot run on cuda" in str(found)
    assert describe("cpu").linear_logps_filtered.impl == on_cpu
