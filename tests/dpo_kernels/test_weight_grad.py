"""Gradients of the weight that are added to an existing one, against those that autograd hands out."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from dpo_kernels import chunks, linear_dpo_loss, linear_logps
from dpo_kernels.linear_logps import slices
from dpo_kernels.linear_logps.ops import linear_logps_backward_accumulate_op

T, D, V = 23, 9, 211
IMPLS = ("torch", "reference")
CU = torch.tensor([0, 5, 9, 9, T])
MODES = ("logps", "dpo mean", "dpo sum", "dpo none")


def make_inputs(dtype: torch.dtype):
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((T, D), (V, D), (V,)))
    labels = torch.randint(0, V, (T,))
    labels[::7] = -100
    return [t.requires_grad_() for t in (hidden, weight, bias)], labels


def objective(mode: str, leaves, labels, **options):
    """A scalar whose gradients differ by row (by pair for the loss)."""
    hidden, weight, bias = leaves
    head = {"bias": bias, "softcap": 3.0, "logit_scale": 0.8, "temperature": 1.3, **options}
    if mode == "logps":
        return (linear_logps(hidden, weight, labels, **head) * torch.arange(T).sin()).sum()
    ref = torch.tensor([-3.0, -1.0, -2.0, -4.0])
    out = linear_dpo_loss(hidden, weight, labels, CU, ref, reduction=mode.split()[1], beta=0.7, **head)
    return (out.loss * torch.tensor([1.5, -0.4])).sum() if mode == "dpo none" else out.loss * 1.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adds_what_autograd_would_hand_out(monkeypatch, dtype, mode: str, impl: str) -> None:
    """Twice, on top of what is there; the weight itself gets nothing, the others get the same bits."""
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 64)
    leaves, labels = make_inputs(dtype)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(objective(mode, exact_leaves, labels, impl="reference"), exact_leaves)[1]
    handed = torch.autograd.grad(objective(mode, leaves, labels, impl=impl), leaves)
    before = torch.randn(V, D, dtype=chunks.accumulation_dtype(dtype))
    main_grad = before.clone()
    loss = objective(mode, leaves, labels, impl=impl, weight_grad=main_grad)
    assert torch.equal(main_grad, before)
    loss.backward(retain_graph=True)
    assert leaves[1].grad is None
    assert torch.equal(leaves[0].grad, handed[0])
    assert torch.equal(leaves[2].grad, handed[2])
    error = (main_grad.double() - before.double() - exact).abs().max()
    rounding = 4 * torch.finfo(main_grad.dtype).eps * (before.abs().max() + exact.abs().max())
    assert error <= 2 * (handed[1].double() - exact).abs().max() + rounding
    loss.backward()
    assert_close(
        main_grad, before + 2 * (exact.to(before.dtype)), rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_are_not_rounded_to_16_bits(impl: str) -> None:
    """The product accumulates in float32: closer to float64 than any bfloat16 gradient can be."""
    leaves, labels = make_inputs(torch.bfloat16)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(objective("logps", exact_leaves, labels, impl="reference"), exact_leaves)[1]
    main_grad = torch.zeros(V, D)
    objective("logps", leaves, labels, impl=impl, weight_grad=main_grad).backward()
    assert_close(main_grad.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["logps", "dpo mean"])
def test_under_autocast_and_in_strided_memory(mode: str) -> None:
    leaves, labels = make_inputs(torch.float32)
    main_grad = torch.zeros(D, V).T
    with torch.autocast("cpu", torch.bfloat16):
        objective(mode, leaves, labels, weight_grad=main_grad).backward()
        expected = torch.autograd.grad(objective(mode, leaves, labels), leaves)
    assert leaves[1].grad is None
    assert_close(main_grad, expected[1], rtol=1e-2, atol=1e-3)
    assert torch.equal(leaves[0].grad, expected[0])


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_and_no_gradients(mode: str) -> None:
    leaves, labels = make_inputs(torch.float32)
    main_grad = torch.ones(V, D)
    with torch.no_grad():
        objective(mode, leaves, labels, weight_grad=main_grad)
    linear_logps(leaves[0][:0], leaves[1], labels[:0], weight_grad=main_grad).sum().backward()
    objective(mode, leaves, torch.full_like(labels, -100), weight_grad=main_grad).backward()
    assert main_grad.eq(1).all()


@pytest.mark.parametrize("mode", ["logps", "dpo mean", "dpo none"])
def test_compiles_whole(mode: str) -> None:
    leaves, labels = make_inputs(torch.float32)
    expected = torch.autograd.grad(objective(mode, leaves, labels), leaves)
    main_grad = torch.ones(V, D)
    torch._dynamo.reset()
    torch.compile(objective, fullgraph=True, backend="aot_eager")(
        mode, leaves, labels, weight_grad=main_grad
    ).backward()
    assert_close(main_grad, expected[1] + 1)
    assert_close([leaves[0].grad, leaves[2].grad], [expected[0], expected[2]])
    assert leaves[1].grad is None


def test_opcheck() -> None:
    leaves, labels = make_inputs(torch.float32)
    hidden, weight, bias = (t.detach() for t in leaves)
    lse = torch.logsumexp(hidden @ weight.T + bias, dim=-1).double()
    for needs in ((True, True), (False, False)):
        arguments = (torch.zeros(V, D), torch.randn(T), hidden, weight, labels, lse, bias)
        opcheck(linear_logps_backward_accumulate_op, (*arguments, None, 1.0, 1.0, -100, "torch", *needs))


@pytest.mark.parametrize(
    ("main_grad", "frozen", "message"),
    [
        (torch.zeros(V, D + 1), False, r"weight_grad must be torch.float32 of shape \[211, 9\].*of shape \[211, 10\]"),
        (torch.zeros(V, D).bfloat16(), False, "weight_grad must be torch.float32 .*got torch.bfloat16"),
        (torch.zeros(V, D, device="meta"), False, "weight_grad must be .* on cpu, .*on meta"),
        (torch.zeros(V, D), True, "weight_grad needs a weight that requires a gradient"),
        (torch.zeros(V, D, requires_grad=True), False, "must not require one itself"),
    ],
)
@pytest.mark.parametrize("mode", ["logps", "dpo mean"])
def test_refused(mode: str, main_grad, frozen: bool, message: str) -> None:
    leaves, labels = make_inputs(torch.bfloat16)
    leaves[1].requires_grad_(not frozen)
    with pytest.raises(ValueError, match=message):
        objective(mode, leaves, labels, weight_grad=main_grad)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_graph_autocast_makes_no_difference(mode: str) -> None:
    """Evaluation with the options of training: the copy that autocast makes of the weight requires no gradient."""
    leaves, labels = make_inputs(torch.float32)
    main_grad = torch.zeros(V, D)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = objective(mode, leaves, labels, weight_grad=main_grad)
        assert torch.equal(got, objective(mode, leaves, labels))
    assert not main_grad.any()
