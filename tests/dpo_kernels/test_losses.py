"""The loss table: golden values, gradients, and what each loss declares about itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kernels import LOSS_TYPES, preference_loss
from dpo_kernels.losses import resolve_loss
from dpo_kernels.pairs import LossOptions, check_options

TRL_LOSSES = {
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
}


def some_pairs(num_pairs: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    values = {
        name: -10 * torch.rand(num_pairs, dtype=dtype)
        for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    }
    return values | {name: torch.randint(1, 20, (num_pairs,)) for name in ("chosen_lengths", "rejected_lengths")}


def test_table_holds_every_loss() -> None:
    assert set(LOSS_TYPES) == TRL_LOSSES | {"ipo_sum", "simpo", "orpo", "cpo", "nll", "dpop", "dpo_shift"}
    assert {name for name, t in LOSS_TYPES.items() if not t.needs_reference} == {"sft", "nll", "simpo", "orpo", "cpo"}
    assert {name for name, t in LOSS_TYPES.items() if t.couples_pairs} == {"aot", "aot_unpaired"}
    for name, loss_type in LOSS_TYPES.items():
        assert "arXiv" in (loss_type.function.__doc__ or "") or name == "sft"


def test_golden_values(shared_dir) -> None:
    golden = json.loads((shared_dir / "golden" / "dpo_losses.json").read_text())
    checked = 0
    for case in golden["cases"]:
        inputs = dict(case["inputs"])
        beta, label_smoothing = inputs.pop("beta"), inputs.pop("label_smoothing")
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in inputs.items()}
        for name, expected in case["loss_per_pair"].items():
            out = preference_loss(
                **tensors,
                loss_type="sigmoid" if name == "cdpo" else name,
                beta=beta,
                label_smoothing=0.0 if name == "sigmoid" else label_smoothing,
            )
            torch.testing.assert_close(out.loss, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
            ratio = tensors["chosen_logps"] - tensors["ref_chosen_logps"]
            torch.testing.assert_close(out.chosen_rewards, beta * ratio)
            checked += 1
    assert checked >= 45


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_gradcheck(name: str, label_smoothing: float) -> None:
    pairs = some_pairs()
    lengths = {k: pairs[k] for k in ("chosen_lengths", "rejected_lengths")}

    def loss(chosen, rejected, ref_chosen, ref_rejected):
        return preference_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            loss_type=name,
            label_smoothing=label_smoothing,
            beta=0.3,
            **lengths,
        ).loss

    inputs = [v.requires_grad_() for v in pairs.values() if v.is_floating_point()]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("margin", [-1e6, -1e4, -300.0, 0.0, 300.0, 1e4, 1e6])
def test_saturated_margins_are_finite(name: str, margin: float) -> None:
    """Margins far beyond what a sigmoid resolves, in float32, with label smoothing."""
    chosen = torch.full((3,), min(0.0, margin), requires_grad=True)
    rejected = torch.full((3,), min(0.0, -margin), requires_grad=True)
    lengths = torch.full((3,), 7)
    out = preference_loss(
        chosen,
        rejected,
        torch.zeros(3),
        torch.zeros(3),
        loss_type=name,
        beta=0.5,
        label_smoothing=0.1,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        discopop_tau=0.05,
    )
    gradients = torch.autograd.grad(out.loss.sum(), (chosen, rejected), allow_unused=True)
    assert out.loss.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_empty_responses_are_finite(name: str) -> None:
    zeros = torch.zeros(2, requires_grad=True)
    nothing = torch.zeros(2, dtype=torch.int64)
    out = preference_loss(
        zeros, zeros * 1, zeros, zeros, loss_type=name, chosen_lengths=nothing, rejected_lengths=nothing
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), zeros)
    assert out.loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_no_pairs(name: str) -> None:
    none = torch.zeros(0)
    out = preference_loss(none, none, none, none, loss_type=name, chosen_lengths=none, rejected_lengths=none)
    assert [t.shape for t in out] == [(0,)] * 3


@pytest.mark.parametrize("name", [n for n, t in LOSS_TYPES.items() if t.needs_reference and not t.couples_pairs])
def test_policy_equal_to_reference_has_zero_margin(name: str) -> None:
    """Then the loss is that of zero log-ratios, whatever the log-probs, and both rewards are exactly 0."""
    pairs = some_pairs()
    pairs["ref_chosen_logps"], pairs["ref_rejected_logps"] = pairs["chosen_logps"], pairs["rejected_logps"]
    out = preference_loss(**pairs, loss_type=name)
    assert out.loss.eq(out.loss[0]).all()
    assert out.chosen_rewards.eq(0).all()
    assert out.rejected_rewards.eq(0).all()
    if name in ("sigmoid", "robust", "sigmoid_norm"):
        torch.testing.assert_close(out.loss[0].item(), math.log(2))


@given(st.lists(st.tuples(*[st.floats(-200, 0)] * 4), min_size=1, max_size=6), st.floats(0.01, 2), st.floats(0, 0.49))
@settings(max_examples=60)
def test_identities(rows, beta, smoothing) -> None:
    """Relations between losses that hold for any numbers."""
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(rows, dtype=torch.float64).T
    lengths = torch.full_like(chosen, 3)

    def loss(name, *tensors, **options):
        return preference_loss(
            *tensors, loss_type=name, beta=beta, chosen_lengths=lengths, rejected_lengths=lengths, **options
        ).loss

    forward = (chosen, rejected, ref_chosen, ref_rejected)
    swapped = (rejected, chosen, ref_rejected, ref_chosen)
    sigmoid, flipped = loss("sigmoid", *forward), loss("sigmoid", *swapped)
    expected = (1 - smoothing) * sigmoid + smoothing * flipped
    torch.testing.assert_close(loss("sigmoid", *forward, label_smoothing=smoothing), expected)
    robust = ((1 - smoothing) * sigmoid - smoothing * flipped) / (1 - 2 * smoothing)
    torch.testing.assert_close(loss("robust", *forward, label_smoothing=smoothing), robust)
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(flipped - sigmoid, margin, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loss("hinge", *forward), (1 - margin).clamp(min=0), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loss("ipo", *forward), loss("ipo_sum", *(t / 3 for t in forward)), atol=1e-6, rtol=1e-9)
    torch.testing.assert_close(
        loss("aot", *forward).sort().values,
        loss("aot", *(t.flip(0) for t in forward)).sort().values,
    )


def test_sft_is_the_token_mean() -> None:
    pairs = some_pairs()
    token_mean = -pairs["chosen_logps"].sum() / pairs["chosen_lengths"].sum()
    out = preference_loss(**pairs, loss_type="sft")
    torch.testing.assert_close(out.loss.mean(), token_mean)
    halves = [
        preference_loss(
            **{k: v[part] for k, v in pairs.items()},
            loss_type="sft",
            mean_chosen_length=pairs["chosen_lengths"].double().mean().item(),
        ).loss
        for part in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(torch.cat(halves), out.loss)


def test_reference_free_losses_against_their_formulas() -> None:
    pairs = some_pairs()
    chosen, rejected = pairs["chosen_logps"], pairs["rejected_logps"]
    mean_chosen, mean_rejected = chosen / pairs["chosen_lengths"], rejected / pairs["rejected_lengths"]
    lengths = {k: pairs[k] for k in ("chosen_lengths", "rejected_lengths")}

    simpo = preference_loss(chosen, rejected, **lengths, loss_type="simpo", beta=2.0, simpo_gamma=0.7)
    expected = -torch.log(torch.sigmoid(2 * (mean_chosen - mean_rejected) - 0.7))
    torch.testing.assert_close(simpo.loss, expected)
    torch.testing.assert_close(simpo.chosen_rewards, 2 * mean_chosen)

    orpo = preference_loss(chosen, rejected, **lengths, loss_type="orpo", beta=0.4)
    odds = [p / (1 - p) for p in (mean_chosen.exp(), mean_rejected.exp())]
    expected = -mean_chosen - 0.4 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    torch.testing.assert_close(orpo.loss, expected)

    cpo = preference_loss(chosen, rejected, **lengths, loss_type="cpo", beta=0.4, cpo_alpha=0.3)
    expected = -torch.log(torch.sigmoid(0.4 * (chosen - rejected))) - 0.3 * mean_chosen
    torch.testing.assert_close(cpo.loss, expected)
    torch.testing.assert_close(cpo.rejected_rewards, 0.4 * rejected)


def test_several_losses_are_added_with_their_weights() -> None:
    pairs = some_pairs()
    parts = [preference_loss(**pairs, loss_type=name).loss for name in ("sigmoid", "bco_pair", "sft")]
    mixed = preference_loss(**pairs, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    torch.testing.assert_close(mixed.loss, 0.8 * parts[0] + 0.2 * parts[1] + parts[2])
    torch.testing.assert_close(preference_loss(**pairs, loss_type=("sigmoid", "sft")).loss, parts[0] + parts[2])


@pytest.mark.parametrize(
    ("loss_type", "weights", "message"),
    [
        (
            "sigmiod",
            None,
            r"unknown loss_type 'sigmiod'; did you mean 'sigmoid'\? Expected one of sigmoid, .*, dpo, dpo_",
        ),
        ("kto", None, "unknown loss_type 'kto'; expected one of sigmoid, "),
        ("dpo-but-better", None, "unknown loss_type 'dpo-but-better'"),
        ([], None, "at least one loss"),
        (["sigmoid", "sft"], [1.0], "expected 2; got 1"),
    ],
)
def test_names_that_cannot_be_resolved(loss_type, weights, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_loss(loss_type, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LossOptions(beta=0.0), "beta must be positive; got 0.0"),
        (LossOptions(beta=float("nan")), "beta must be positive"),
        (LossOptions(label_smoothing=0.5), "label_smoothing must be in"),
        (LossOptions(label_smoothing=-0.1), "label_smoothing must be in"),
        (LossOptions(discopop_tau=0.0), "discopop_tau must be positive"),
        (LossOptions(dpop_lambda=-1.0), "dpop_lambda must not be negative; got -1.0"),
        (LossOptions(shift_lambda=0.0), r"shift_lambda must be in \(0, 1\]; got 0.0"),
    ],
)
def test_numbers_out_of_range(options: LossOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(options)


def test_names_of_others() -> None:
    for alias, name in (("dpo", "sigmoid"), ("dpo_norm", "sigmoid_norm")):
        assert resolve_loss(alias) == resolve_loss(name)
    assert resolve_loss(["dpo", "sft"]) == resolve_loss(["sigmoid", "sft"])


def test_losses_that_keep_the_chosen_log_prob_up() -> None:
    pairs = some_pairs()
    pairs["ref_chosen_logps"] = pairs["chosen_logps"] - torch.tensor([3.0, -2.0, 0.5, -4.0, -1.0])
    chosen = pairs["chosen_logps"] - pairs["ref_chosen_logps"]
    rejected = pairs["rejected_logps"] - pairs["ref_rejected_logps"]
    nll = preference_loss(**pairs, loss_type="nll").loss
    torch.testing.assert_close(nll, -pairs["chosen_logps"] / pairs["chosen_lengths"])
    dpop = preference_loss(**pairs, loss_type="dpop", beta=0.3, dpop_lambda=5.0)
    fallen = torch.clamp(pairs["ref_chosen_logps"] - pairs["chosen_logps"], min=0)
    torch.testing.assert_close(dpop.loss, -torch.log(torch.sigmoid(0.3 * (chosen - rejected - 5 * fallen))))
    shift = preference_loss(**pairs, loss_type="dpo_shift", beta=0.3, shift_lambda=0.75)
    torch.testing.assert_close(shift.loss, -torch.log(torch.sigmoid(0.3 * chosen - 0.3 * 0.75 * rejected)))
    plain = preference_loss(**pairs, beta=0.3)
    for name, options in (("dpop", {"dpop_lambda": 0.0}), ("dpo_shift", {"shift_lambda": 1.0})):
        torch.testing.assert_close(preference_loss(**pairs, loss_type=name, beta=0.3, **options).loss, plain.loss)
    torch.testing.assert_close(dpop.chosen_rewards, plain.chosen_rewards)


@pytest.mark.parametrize("name", [name for name, t in LOSS_TYPES.items() if t.takes_margins])
def test_margins_are_to_be_exceeded(name: str) -> None:
    """A target margin m is what a reference would be whose chosen log-prob is m / beta higher; rewards do not move."""
    pairs = some_pairs() | {name: torch.full((5,), 4) for name in ("chosen_lengths", "rejected_lengths")}
    margins = torch.rand(5, dtype=torch.float64)
    found = preference_loss(**pairs, loss_type=name, beta=0.4, margins=margins)
    per_token = 4 if name in ("sigmoid_norm", "simpo") else 1
    side = "chosen_logps" if name == "simpo" else "ref_chosen_logps"
    moved = pairs | {side: pairs[side] + (-1 if name == "simpo" else 1) * per_token * margins / 0.4}
    torch.testing.assert_close(found.loss, preference_loss(**moved, loss_type=name, beta=0.4).loss)
    torch.testing.assert_close(found.chosen_rewards, preference_loss(**pairs, loss_type=name, beta=0.4).chosen_rewards)
    assert torch.equal(
        preference_loss(**pairs, loss_type=name, margins=0 * margins).loss,
        preference_loss(**pairs, loss_type=name).loss,
    )


DIVERGENCES = {
    "reverse_kl": lambda t: t * t.log(),
    "forward_kl": lambda t: -t.log(),
    "js_divergence": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
    "alpha_divergence": lambda t: (t**0.7 - 0.7 * t - 0.3) / (0.7 * (0.7 - 1)),
}
"""Generators f of the divergences, for alpha 0.7. Their derivatives are scores but for constants, which cancel."""


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "ipo_sum"])
def test_scores_are_derivatives_of_the_divergence(kind: str, name: str) -> None:
    pairs = some_pairs()
    sides = []
    for side in ("chosen", "rejected"):
        ratio = ((pairs[f"{side}_logps"] - pairs[f"ref_{side}_logps"]) / 5).requires_grad_()
        density = ratio.exp()
        (slope,) = torch.autograd.grad(DIVERGENCES[kind](density).sum(), density)
        pairs[f"{side}_logps"], pairs[f"ref_{side}_logps"] = ratio.detach(), torch.zeros_like(ratio)
        sides.append(slope.detach())
    options = {"loss_type": name, "beta": 0.6}
    found = preference_loss(**pairs, f_divergence_type=kind, f_alpha_divergence_coef=0.7, **options)
    zeros = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(found.loss, preference_loss(*sides, zeros, zeros, **options).loss)
    torch.testing.assert_close(found.chosen_rewards, 0.6 * pairs["chosen_logps"])


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_of_scores(kind: str) -> None:
    pairs = some_pairs()
    inputs = [v.requires_grad_() for v in pairs.values() if v.is_floating_point()]
    lengths = {k: pairs[k] for k in ("chosen_lengths", "rejected_lengths")}
    for name in (name for name, t in LOSS_TYPES.items() if t.takes_divergence):

        def loss(*tensors, name=name):
            return preference_loss(*tensors, loss_type=name, beta=0.3, f_divergence_type=kind, **lengths).loss

        assert torch.autograd.gradcheck(loss, inputs)


def test_an_alpha_divergence_at_one_is_dpo_and_does_not_overflow() -> None:
    pairs = some_pairs()
    limit = preference_loss(**pairs, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert torch.equal(limit.loss, preference_loss(**pairs).loss)
    far = torch.tensor([-1e4], requires_grad=True)
    nothing = torch.zeros(1)
    out = preference_loss(far, nothing, nothing, nothing, f_divergence_type="alpha_divergence", beta=0.1)
    out.loss.backward()
    assert out.loss.isfinite().all()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "alpha_divergence", "js_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "sigmoid_norm"])
@pytest.mark.parametrize("chosen", [-100.0, -120.0, 120.0])
def test_ratios_far_from_0_give_numbers(kind: str, name: str, chosen: float) -> None:
    """In float32: e^100 is none."""
    sides = [torch.tensor([side], requires_grad=True) for side in (chosen, -110.0)]
    lengths = {"chosen_lengths": torch.tensor([9]), "rejected_lengths": torch.tensor([9])}
    options = {"loss_type": name, "f_divergence_type": kind, "label_smoothing": 0.1, **lengths}
    loss = preference_loss(*sides, torch.zeros(1), torch.zeros(1), **options).loss
    loss.sum().backward()
    assert not loss.isnan()
    assert all(side.grad.isfinite() for side in sides)
    if kind == "forward_kl" and name in ("hinge", "discopop", "sigmoid_norm"):
        # The lower response is far the lower one for this divergence.
        assert (loss > 1) if chosen < -110 else (loss == 0)


@pytest.mark.parametrize(
    "option", ["beta", "dpop_lambda", "simpo_gamma", "cpo_alpha", "discopop_tau", "f_alpha_divergence_coef"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must .*; got {value}"):
        preference_loss(**some_pairs(), **{option: value})
    with pytest.raises(ValueError, match="loss_weights must be finite"):
        preference_loss(**some_pairs(), loss_weights=[value])


def test_options_without_a_meaning_are_refused() -> None:
    pairs = some_pairs()
    with pytest.raises(ValueError, match="no meaning for apo_zero: what does not cancel there cancels in sigm"):
        preference_loss(**pairs, loss_type="apo_zero", f_divergence_type="forward_kl")
    with pytest.raises(ValueError, match="margins have no meaning for aot; losses with a target margin: sigmoid"):
        preference_loss(**pairs, loss_type=["sigmoid", "aot"], margins=torch.zeros(5))
    with pytest.raises(ValueError, match=r"f_divergence_type must be one of reverse_kl, .*; got 'kl'"):
        preference_loss(**pairs, f_divergence_type="kl")
    preference_loss(**pairs, loss_type=["sigmoid", "sft", "nll"], margins=torch.zeros(5))
