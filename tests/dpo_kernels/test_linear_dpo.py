"""``linear_dpo_loss``: every loss, reduction and implementation on the CPU against the plain composition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import linear_dpo_loss, linear_logps, preference_loss
from dpo_kernels.linear_dpo import ops
from tests.dpo_kernels.linear_dpo_setup import IMPLS, LOSSES, Case, compose, results, upstream_of
from tests.dpo_kernels.native_setup import NATIVE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
def test_every_loss_and_reduction(loss_type, reduction: str, impl: str) -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    options = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": 0.1, "softcap": 4.0}
    options |= {"reduction": reduction, "pair_weights": case.pair_weights}
    upstream = upstream_of(case, reduction)
    leaves = case.leaves()
    expected = results(compose(case, leaves, **options), leaves, upstream)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl=impl, **options)
    assert not any(t.requires_grad for t in out[1:])
    torch.testing.assert_close(results(out, leaves, upstream), expected)


@pytest.mark.parametrize("impl", IMPLS + NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_at_most_twice_that_of_torch(dtype: torch.dtype, impl: str, reduction: str) -> None:
    case = Case((40, 60, 25, 10, 3, 80), D=33, V=777, dtype=dtype)
    case.weight = case.weight / 4
    options = {"loss_type": "sigmoid", "beta": 0.1, "reduction": reduction}
    upstream = upstream_of(case, reduction)
    truth_leaves = case.leaves(torch.float64)
    truth = results(compose(case, truth_leaves, **options), truth_leaves, upstream.double())

    leaves = case.leaves()
    logits = torch.nn.functional.linear(*leaves).float()
    ignored = case.labels == -100
    per_token = logits.log_softmax(-1).gather(1, case.labels.masked_fill(ignored, 0)[:, None])[:, 0]
    sums = torch.stack([t.sum() for t in per_token.masked_fill(ignored, 0).split(case.cu.diff().tolist())])
    naive = preference_loss(sums[0::2], sums[1::2], case.ref[0::2], case.ref[1::2])
    naive_loss = naive.loss.mean() if reduction == "mean" else naive.loss
    theirs = results((naive_loss, naive.loss, sums, *naive[1:]), leaves, upstream)

    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl=impl, **options)
    ours = results(out, leaves, upstream)
    names = ("loss", "pair_losses", "logps", "chosen_rewards", "rejected_rewards", "dX", "dW", "db")
    for name, exact, other, found in zip(names, truth, theirs, ours, strict=True):
        assert found.dtype == other.dtype
        bound = 2 * (other.double() - exact).abs().max() + 4 * torch.finfo(found.dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= bound, name


@pytest.mark.parametrize("trained", [t for t in itertools.product((0, 1), repeat=3) if any(t)])
@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs(impl: str, trained) -> None:
    """What is frozen gets no gradient, and changes no other."""
    case = Case(RESPONSE_LENGTHS["uneven"])
    upstream = upstream_of(case, "mean")
    leaves = case.leaves(trained=trained)
    expected = results(compose(case, leaves, loss_type="sigmoid"), leaves, upstream)
    leaves = case.leaves(trained=trained)
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl=impl)
    torch.testing.assert_close(results(out, leaves, upstream), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(impl: str, reduction: str) -> None:
    case = Case((2, 1, 1, 3), D=3, V=7)

    def loss(hidden, weight, bias):
        out = linear_dpo_loss(
            hidden,
            weight,
            case.labels,
            case.cu,
            case.ref,
            bias=bias,
            softcap=2.0,
            logit_scale=1.2,
            temperature=0.8,
            reduction=reduction,
            pair_weights=case.pair_weights,
            impl=impl,
        )
        return out.loss

    assert torch.autograd.gradcheck(loss, case.leaves())


@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
def test_empty_and_ignored(loss_type) -> None:
    """No rows, no pairs, and nothing but ignored rows: defined values, zero gradients of the right shape."""
    for lengths, ignored in (((), False), ((0, 0, 0, 0), False), ((3, 2, 1, 4), True)):
        case = Case(lengths)
        if ignored:
            case.labels.fill_(-100)
        for reduction in ("mean", "none"):
            leaves = case.leaves()
            out = linear_dpo_loss(
                *leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], loss_type=loss_type, reduction=reduction
            )
            assert out.loss.isfinite().all()
            assert out.logps.eq(0).all()
            gradients = torch.autograd.grad(out.loss.sum(), leaves, materialize_grads=True)
            assert all(g.eq(0).all() and g.shape == t.shape for g, t in zip(gradients, leaves, strict=True))
        if not lengths:
            assert linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, loss_type=loss_type).loss == 0


def test_policy_equal_to_reference_gives_log_two() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], dtype=torch.float32)
    leaves = case.leaves()
    logps = linear_logps(leaves[0], leaves[1], case.labels)
    sums = ops.response_sums(logps.detach(), case.cu)
    out = linear_dpo_loss(leaves[0], leaves[1], case.labels, case.cu, sums)
    torch.testing.assert_close(out.pair_losses, torch.full((3,), 2.0).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.chosen_rewards, torch.zeros(3), atol=1e-5, rtol=0)


def test_saturated_margins() -> None:
    case = Case(RESPONSE_LENGTHS["even"], dtype=torch.float32)
    for sign in (1.0, -1.0):
        case.ref = sign * torch.tensor([1e6, -1e6, 1e6, -1e6])
        leaves = case.leaves()
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref)
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(t.grad.isfinite().all() for t in leaves[:2])
        if sign < 0:
            assert leaves[0].grad.eq(0).all()


def test_float16_keeps_gradients_that_a_loss_scale_saves() -> None:
    """A gradient formed in forward waits for its factor in float32: scaled before it is rounded, not after."""
    case = Case((30, 30), D=16, V=500, dtype=torch.float16, ignored=False)
    case.weight = case.weight / 8
    scale = 2.0**16
    exact_leaves = case.leaves(torch.float64)
    options = {"loss_type": "sigmoid", "beta": 1e-4}
    exact = results(compose(case, exact_leaves, **options), exact_leaves, torch.tensor(scale).double())
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], **options)
    ours = results(out, leaves, torch.tensor(scale))
    for found, truth in zip(ours[5:], exact[5:], strict=True):
        assert found.dtype == torch.float16
        assert (found.double() - truth).abs().max() <= 2e-3 * truth.abs().max()


def test_pairs_do_not_depend_on_their_neighbours() -> None:
    """Batched and one by one: same losses, and gradients that add up. ``sft`` gets the batch's mean length."""
    case = Case(RESPONSE_LENGTHS["uneven"], ignored=False)
    for loss_type in ("sigmoid", "ipo", "sft", "orpo"):
        leaves = case.leaves()
        mean_length = case.cu.diff()[0::2].double().mean().item()
        options = {"loss_type": loss_type, "reduction": "sum"}
        whole = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, **options)
        expected = torch.autograd.grad(whole.loss, leaves[:2])
        total, losses = torch.zeros_like(leaves[1]), []
        for pair in range(3):
            start, stop = int(case.cu[2 * pair]), int(case.cu[2 * pair + 2])
            part = linear_dpo_loss(
                leaves[0][start:stop],
                leaves[1],
                case.labels[start:stop],
                case.cu[2 * pair : 2 * pair + 3] - start,
                case.ref[2 * pair : 2 * pair + 2],
                mean_chosen_length=mean_length,
                **options,
            )
            losses.append(part.pair_losses)
            total += torch.autograd.grad(part.loss, leaves[1])[0]
        torch.testing.assert_close(torch.cat(losses), whole.pair_losses)
        torch.testing.assert_close(total, expected[1])
