"""``linear_dpo_loss`` under autograd's modes, and with inputs of any layout or none that will do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import linear_dpo_loss
from tests.dpo_kernels.linear_dpo_setup import Case, results


def test_retained_graph_and_second_backward() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], dtype=torch.float32)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2])
    first = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    last = torch.autograd.grad(3 * out.loss, leaves)
    for a, b, c, d in zip(kept, first, second, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(3 * out.loss, leaves)


def test_accumulation_leaves_earlier_gradients_alone() -> None:
    """Handing a gradient over must not let a later backward write into it."""
    cases = [Case(RESPONSE_LENGTHS["uneven"], dtype=torch.float32) for _ in range(2)]
    weight = cases[0].weight.clone().requires_grad_()
    separate = []
    for case in cases:
        weight.grad = None
        linear_dpo_loss(case.hidden, weight, case.labels, case.cu, case.ref).loss.backward()
        separate.append(weight.grad.clone())
    weight.grad = None
    losses = [linear_dpo_loss(c.hidden, weight, c.labels, c.cu, c.ref).loss for c in cases]
    sum(losses).backward()
    torch.testing.assert_close(weight.grad, separate[0] + separate[1])


def test_double_backward_raises() -> None:
    case = Case(RESPONSE_LENGTHS["even"])
    leaves = case.leaves()
    for reduction in ("mean", "none"):
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, reduction=reduction)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.loss.sum(), leaves[:2], create_graph=True)


def test_runs_have_the_same_bits_and_inputs_stay() -> None:
    case = Case((40, 60, 25, 10), D=33, V=777, dtype=torch.float32)
    before = [t.clone() for t in (case.hidden, case.weight, case.labels, case.cu, case.ref)]

    def once() -> list[torch.Tensor]:
        leaves = case.leaves()
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2])
        return results(out, leaves, torch.tensor(1.3))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
    after = (case.hidden, case.weight, case.labels, case.cu, case.ref)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_autocast() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], D=16, dtype=torch.float32)
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2])
    found = results(out, leaves, torch.tensor(1.0))
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = linear_dpo_loss(*low[:2], case.labels, case.cu, case.ref, bias=low[2])
    for a, b in zip(found, results(expected, low, torch.tensor(1.0)), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_non_contiguous_inputs_and_int64_offsets() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    leaves = case.leaves()
    one = torch.ones((), dtype=torch.float64)
    expected = results(linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref), leaves[:2], one)
    T, D = case.hidden.shape
    hidden = torch.zeros(D, T).double().T.copy_(case.hidden).requires_grad_()
    weight = torch.zeros(23, 2 * D).double()[:, ::2].copy_(case.weight).requires_grad_()
    ref = torch.zeros(6, 2).double()[:, 0].copy_(case.ref)
    out = linear_dpo_loss(hidden, weight, case.labels.int(), case.cu.long(), ref)
    torch.testing.assert_close(results(out, [hidden, weight], one), expected)


def test_inference_mode() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    expected = linear_dpo_loss(case.hidden, case.weight, case.labels, case.cu, case.ref)
    with torch.inference_mode():
        ref = case.ref.clone()
        out = linear_dpo_loss(case.hidden, case.weight, case.labels, case.cu, ref)
    torch.testing.assert_close([t.clone() for t in out], list(expected))
    leaves = case.leaves()
    linear_dpo_loss(*leaves[:2], case.labels, case.cu, ref).loss.backward()
    assert leaves[1].grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_responses": torch.tensor([0, 4])}, r"cu_responses must have shape \[responses \+ 1\].*got \[2\]"),
        ({"cu_responses": torch.tensor([0.0, 2, 4])}, "cu_responses must be int32 or int64; got torch.float32"),
        ({"cu_responses": torch.tensor([0, 2, 5])}, r"rise from 0 to the number of rows, 4; got \[0, 2, 5\]"),
        ({"cu_responses": torch.tensor([1, 2, 4])}, "rise from 0 to the number of rows, 4"),
        ({"cu_responses": torch.tensor([0, 5, 4])}, "rise from 0 to the number of rows, 4"),
        ({"ref_logps_S": None}, "sigmoid needs ref_logps_S.*got None"),
        ({"ref_logps_S": torch.zeros(3)}, r"ref_logps_S must have shape \[2\].*got \[3\]"),
        (
            {"cu_responses": torch.zeros(3, dtype=torch.long, device="meta")},
            "cu_responses must be on the CPU.*got meta",
        ),
        (
            {"pair_weights": torch.zeros(1, device="meta")},
            "pair_weights must be on the device of hidden, cpu; got meta",
        ),
        ({"pair_weights": torch.zeros(2)}, r"pair_weights must have shape \[1\].*got \[2\]"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none; got 'avg'"),
        ({"loss_type": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "sft", "mean_chosen_length": -1.0}, "mean_chosen_length must be positive"),
        ({"labels_T": torch.tensor([0, 1, 7, 0])}, r"labels must be in \[0, 5\).*got 7 at index 2"),
        ({"labels_T": torch.zeros(5, dtype=torch.long)}, r"labels must have shape \[4\]"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str, trained: bool) -> None:
    arguments = {
        "hidden_TD": torch.zeros(4, 3),
        "weight_VD": torch.zeros(5, 3, requires_grad=trained),
        "labels_T": torch.zeros(4, dtype=torch.long),
        "cu_responses": torch.tensor([0, 2, 4]),
        "ref_logps_S": torch.zeros(2),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(**arguments)


@pytest.mark.parametrize(
    ("offsets", "error", "got"),
    [
        ([0, 2, 4], TypeError, "got list"),
        (torch.tensor([2, 2]), ValueError, r"got \[2\]"),
        (torch.tensor([2, 1, 1]), ValueError, r"got \[2, 1, 1\]"),
    ],
)
def test_offsets_that_are_none_say_what_is_wanted(offsets, error: type[Exception], got: str) -> None:
    hidden, weight, labels = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
    wanted = r"cumulative offsets that begin with 0 .*torch\.tensor\(\[0, 3, 5, 9, 10\]\)"
    with pytest.raises(error, match=rf"^cu_responses .*{got}.*; {wanted}$"):
        linear_dpo_loss(hidden, weight, labels, offsets, torch.zeros(2))
