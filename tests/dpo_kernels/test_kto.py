"""KTO: the loss against its formula, and the fused op against plain torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpo_kernels import kto_divergence, kto_loss, linear_kto_loss
from dpo_kernels.head import Head
from dpo_kernels.linear_logps.reference import logps as reference_logps

LENGTHS = [4, 1, 7, 3, 2]
DESIRABLE = torch.tensor([True, False, False, True, True])
SIDES = {"desirable_weight": 0.7, "undesirable_weight": 1.3}


def divergence_of(loss_type: str) -> torch.Tensor | None:
    return torch.tensor(0.8, dtype=torch.float64) if loss_type == "kto" else None


def formula(logps: torch.Tensor, ref: torch.Tensor, loss_type: str, beta: float) -> torch.Tensor:
    """Equations 7 and 8 of the paper with v as there, a response at a time."""
    z = 0.8 if loss_type == "kto" else 0.0
    losses = []
    for ratio, desirable in zip(logps - ref, DESIRABLE, strict=True):
        weight = SIDES["desirable_weight" if desirable else "undesirable_weight"]
        value = torch.sigmoid(beta * (ratio - z)) if desirable else torch.sigmoid(beta * (z - ratio))
        losses.append(weight - weight * value)
    return torch.stack(losses)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_formula(loss_type):
    torch.manual_seed(0)
    logps, ref = (-10 * torch.rand(5, dtype=torch.float64) for _ in range(2))
    options = {"loss_type": loss_type, "beta": 0.3, "divergence": divergence_of(loss_type), **SIDES}
    out = kto_loss(logps, ref, DESIRABLE, **options)
    torch.testing.assert_close(out.loss, formula(logps, ref, loss_type, 0.3))
    torch.testing.assert_close(out.rewards, 0.3 * (logps - ref))
    half = kto_loss(logps.bfloat16(), ref.bfloat16(), DESIRABLE, **options)
    assert half.loss.dtype == torch.float32
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, ref, DESIRABLE, **options).loss, (logps,))
    assert not out.rewards.requires_grad
    if loss_type == "kto":
        options["divergence"] = options["divergence"].reshape(1, 1)
        assert torch.equal(kto_loss(logps, ref, DESIRABLE, **options).loss, out.loss)


def test_the_divergence_is_a_mean_of_log_ratios_and_not_negative():
    logps, ref = torch.tensor([-3.0, -5.0, -2.0], requires_grad=True), torch.tensor([-4.0, -5.5, -2.5])
    found = kto_divergence(logps, ref)
    assert found.item() == pytest.approx(2 / 3)
    assert not found.requires_grad
    assert kto_divergence(ref, logps).item() == 0
    assert kto_divergence(ref[:0], logps[:0]).item() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
def test_the_fused_op_is_the_composition(impl, loss_type, reduction):
    torch.manual_seed(0)
    T, B = sum(LENGTHS), len(LENGTHS)
    dtype = torch.float32 if impl == "auto" else torch.float64
    exact = [torch.randn(*shape, dtype=torch.float64).to(dtype).double() for shape in ((T, 5), (23, 5), (23,))]
    labels = torch.randint(0, 23, (T,))
    labels[3] = -100
    ref, weights = -3 * torch.rand(B, dtype=torch.float64), torch.rand(B, dtype=torch.float64)
    tokens = torch.rand(T, dtype=torch.float64)
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    options = {"loss_type": loss_type, "beta": 0.3, "divergence": divergence_of(loss_type), **SIDES}

    leaves = [tensor.clone().requires_grad_() for tensor in exact]
    logps_T, _ = reference_logps(leaves[0], Head(leaves[1], leaves[2]), labels)
    sums = torch.stack([part.sum() for part in (logps_T * tokens).split(LENGTHS)])
    wanted = kto_loss(sums, ref, DESIRABLE, **options)
    losses = wanted.loss * weights
    loss = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    upstream = torch.rand_like(loss) + 0.5
    expected = [loss, losses, sums, wanted.rewards, *torch.autograd.grad(loss, leaves, upstream)]

    ours = [tensor.to(dtype).clone().requires_grad_() for tensor in exact]
    out = linear_kto_loss(
        ours[0], ours[1], labels, cu, ref.to(dtype), DESIRABLE, bias=ours[2], response_weights=weights.to(dtype),
        token_weights=tokens.to(dtype), reduction=reduction, impl=impl, stats=("entropy",), **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, ours, upstream.to(dtype))
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for got, want in zip((*out[:4], *gradients), expected, strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)
    assert out.stats["entropy"].shape == (T,)
    assert not any(t.requires_grad for t in out[1:4])


def test_no_responses_at_all():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    none, cu = torch.zeros(0), torch.zeros(1, dtype=torch.int32)
    args = (hidden, weight, torch.zeros(0, dtype=torch.long), cu, none, none.bool())
    out = linear_kto_loss(*args, divergence=torch.tensor(0.0))
    assert out.loss.item() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "dpo"}, "loss_type must be one of kto, apo_zero_unpaired; got 'dpo'"),
        ({"divergence": None}, "loss_type kto needs a divergence; got None"),
        ({"loss_type": "apo_zero_unpaired"}, "loss_type apo_zero_unpaired does not read a divergence; got one"),
        ({"divergence": torch.zeros(2)}, r"divergence must be one number; got shape \[2\]"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"desirable_weight": -1.0}, "desirable_weight must be finite and not negative; got -1.0"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight must be finite and not negative; got nan"),
    ],
)
def test_numbers_that_are_refused(options, words):
    logps = torch.tensor([-1.0, -2.0])
    labels = torch.tensor([True, False])
    options = {"divergence": torch.tensor(0.1)} | options
    with pytest.raises(ValueError, match=words):
        kto_loss(logps, logps, labels, **options)
    hidden, cu = torch.randn(3, 4), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=words):
        linear_kto_loss(hidden, torch.randn(7, 4), torch.tensor([1, 2, 3]), cu, logps, labels, **options)


def test_shapes_that_do_not_fit():
    logps, labels, z = torch.tensor([-1.0, -2.0]), torch.tensor([True, False]), torch.tensor(0.1)
    with pytest.raises(ValueError, match=r"must all have shape \[responses\]; got \[2\], \[1\], \[2\]"):
        kto_loss(logps, logps[:1], labels, divergence=z)
    with pytest.raises(ValueError, match=r"desirable must be bool; got torch\.int64"):
        kto_loss(logps, logps, labels.long(), divergence=z)
    hidden, weight, ids = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"cu_responses must have shape \[3\] and ref_logps \[2\], for 2 responses"):
        linear_kto_loss(hidden, weight, ids, torch.tensor([0, 1, 2, 3]), logps, labels, divergence=z)
    with pytest.raises(ValueError, match=r"desirable must be bool \[responses\]; got torch.int64 \[2\]"):
        linear_kto_loss(hidden, weight, ids, torch.tensor([0, 1, 3]), logps, labels.long(), divergence=z)
    with pytest.raises(TypeError, match="unexpected keyword argument 'margins'"):
        linear_kto_loss(hidden, weight, ids, torch.tensor([0, 1, 3]), logps, labels, divergence=z, margins=logps)
