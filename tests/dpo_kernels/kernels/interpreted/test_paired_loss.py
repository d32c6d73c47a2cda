"""The paired-loss kernel against the loss table: values, and slopes against autograd, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpo_kernels.kernels.paired_loss import KERNEL_LOSSES, PairTerms, launch_pairs, loss_numbers
from dpo_kernels.linear_dpo.interface import make_pairs
from dpo_kernels.losses import LOSS_TYPES, resolve_loss
from dpo_kernels.pairs import F_DIVERGENCES, LossOptions

OPTIONS = LossOptions(beta=0.3, label_smoothing=0.1, discopop_tau=0.2, simpo_gamma=0.4, cpo_alpha=0.7, dpop_lambda=3.0)
UNEVEN = (5, 9, 1, 7, 0, 3, 1, 1)


class Batch:
    """Log-probs of rows, their responses, and the terms of a loss."""

    def __init__(
        self, lengths=UNEVEN, names=("sigmoid",), weights=None, options=OPTIONS, offset: float = 0.0, margins_P=None
    ):
        self.mix = resolve_loss(names, weights)
        self.lengths = torch.tensor(lengths)
        self.cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        self.logps_T = -2 * torch.rand(sum(lengths))
        sums = torch.stack([part.sum() for part in self.logps_T.split(list(lengths))])
        self.ref_S = sums + torch.randn(len(lengths)) + offset * torch.tensor([1.0, -1.0]).repeat(len(lengths) // 2)
        self.scale_P = torch.rand(len(lengths) // 2) + 0.5
        self.options = options
        self.terms = PairTerms(
            names=tuple(t.name for t in self.mix.types),
            weights=self.mix.weights,
            **loss_numbers(options),
            ref_logps_S=self.ref_S if self.mix.needs_reference else None,
            lengths_S=self.lengths.float() if self.mix.needs_lengths else None,
            mean_length=torch.tensor(3.5),
            scale_P=self.scale_P,
            cu_S1=self.cu,
            margins_P=margins_P,
        )
        self.margins_P = margins_P

    def launch(self, first_pair: int = 0, num_pairs: int | None = None):
        """All pairs, or some, whose rows then begin at 0."""
        num_pairs = len(self.scale_P) if num_pairs is None else num_pairs
        start, stop = self.cu[2 * first_pair].item(), self.cu[2 * (first_pair + num_pairs)].item()
        rows = self.logps_T[start:stop]
        return launch_pairs(rows, self.terms, first_pair=first_pair, num_pairs=num_pairs, first_row=start)

    def expected(self, dtype: torch.dtype = torch.float64):
        """(losses, sums, slopes) from the table and autograd."""
        rows = self.logps_T.to(dtype)
        sums = torch.stack([part.sum() for part in rows.split(self.lengths.tolist())]).requires_grad_()
        ref = self.ref_S.to(dtype) if self.mix.needs_reference else None
        pairs = make_pairs(
            sums, ref, self.lengths.to(dtype), torch.tensor(3.5, dtype=dtype), self.options, self.margins_P
        )
        losses = self.mix.losses(pairs)
        (slopes,) = torch.autograd.grad((losses * self.scale_P.to(dtype)).sum(), sums)
        return losses.detach(), sums.detach(), slopes


def compare(batch: Batch, tolerance: float = 4e-6, dtype: torch.dtype = torch.float64):
    got = batch.launch()
    for name, value, expected in zip(("loss", "sum", "slope"), got[:3], batch.expected(dtype), strict=True):
        value, expected = value.double(), expected.double()
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            value, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(got.grad_T, got.slopes_S.repeat_interleave(batch.lengths))


def test_every_loss_that_does_not_couple_pairs_has_a_kernel():
    assert set(KERNEL_LOSSES) == {name for name, loss in LOSS_TYPES.items() if not loss.couples_pairs}


@pytest.mark.parametrize("name", KERNEL_LOSSES)
def test_losses(name):
    compare(Batch(names=name))


@pytest.mark.parametrize("name", [n for n in KERNEL_LOSSES if n not in ("orpo", "simpo", "cpo", "sft", "nll")])
@pytest.mark.parametrize("offset", [-40.0, 40.0, -400.0, 400.0])
def test_saturated_margins(name, offset):
    compare(Batch(names=name, offset=offset))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", KERNEL_LOSSES)
def test_numbers_that_are_not_finite(name, smoothing, value):
    """Loss and slopes are nan, or infinite, where the table's are: from log-probs, references and weights of pairs."""
    places = [("logps_T", [0]), ("logps_T", [2]), ("logps_T", [0, 2]), ("ref_S", [0]), ("ref_S", [1])]
    # sft and nll know nothing of the rejected response, whose slope here is 0 times the weight.
    if value != value and name not in ("sft", "nll"):
        places.append(("scale_P", [0]))
    for field, where in places:
        batch = Batch((2, 2, 1, 1), names=name, options=LossOptions(beta=0.3, label_smoothing=smoothing))
        getattr(batch, field)[where] = value
        got, expected = batch.launch(), batch.expected(torch.float32)
        for found, other in ((got.losses_P, expected[0]), (got.slopes_S, expected[2])):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", F_DIVERGENCES)
@pytest.mark.parametrize("name", [n for n in KERNEL_LOSSES if LOSS_TYPES[n].takes_divergence])
def test_scores_of_other_divergences(name, kind):
    compare(Batch(names=name, options=OPTIONS._replace(f_divergence=F_DIVERGENCES.index(kind), f_alpha=0.3)))


@pytest.mark.parametrize(
    ("kind", "f_alpha"),
    [("alpha_divergence", 0.3), ("alpha_divergence", 1.0), ("alpha_divergence", 2.5), ("forward_kl", 0)],
)
def test_an_exponent_that_is_cut_off(kind, f_alpha):
    """Ratios of 400 nats: the score is huge, and flat or straight, where it would not be a number."""
    options = LossOptions(beta=0.3, f_divergence=F_DIVERGENCES.index(kind), f_alpha=f_alpha)
    for offset in (-400.0, 400.0):
        compare(Batch(names="sigmoid", options=options, offset=offset), dtype=torch.float32)


@pytest.mark.parametrize("name", [n for n in KERNEL_LOSSES if LOSS_TYPES[n].takes_margins])
def test_target_margins(name):
    batch = Batch(names=(name, "nll"), margins_P=torch.rand(len(UNEVEN) // 2))
    compare(batch)
    part, whole = batch.launch(1, 2), batch.launch()
    assert torch.equal(part.losses_P, whole.losses_P[1:3])


@pytest.mark.parametrize("name", ["sigmoid", "exo_pair", "simpo", "cpo"])
def test_without_smoothing(name):
    compare(Batch(names=name, options=LossOptions()))


def test_orpo_near_certainty():
    """Log-prob per token at 0 and just below it, where the clamp, one rounding unit of fp32, keeps the odds finite."""
    batch = Batch((2, 2, 1, 1), names="orpo")
    batch.logps_T[:] = torch.tensor([0.0, 0.0, -1e-7, -1e-6, -1e-5, -50.0])
    compare(batch, tolerance=1e-4, dtype=torch.float32)


@pytest.mark.parametrize("weights", [None, (1.0, 0.2, -0.5)])
def test_weighted_sums_of_losses(weights):
    compare(Batch(names=("sigmoid", "sft", "bco_pair"), weights=weights))


def test_responses_longer_than_a_block():
    # The log-prob of 2500 tokens is known to 2e-4 in fp32, so is the margin.
    compare(Batch((1023, 1024, 1025, 2500)), tolerance=1e-4)


def test_long_sums_are_rounded_once():
    """20000 terms: a running fp32 sum would be off by a thousand times this."""
    batch = Batch((20000, 1))
    sums = batch.launch().logps_S
    torch.testing.assert_close(sums.double(), batch.expected()[1], rtol=6e-8, atol=0)


def test_some_pairs_of_a_call():
    batch = Batch()
    whole, part = batch.launch(), batch.launch(1, 2)
    assert torch.equal(part.losses_P, whole.losses_P[1:3])
    assert torch.equal(part.slopes_S, whole.slopes_S[2:6])
    assert torch.equal(part.grad_T, whole.grad_T[batch.cu[2] : batch.cu[6]])


def test_empty_responses_only():
    batch = Batch((0, 0, 0, 0))
    compare(batch)


def test_two_runs_are_bitwise_equal():
    batch = Batch((1500, 700, 3, 3000))
    assert all(torch.equal(a, b) for a, b in zip(batch.launch(), batch.launch(), strict=True))
