"""The loss table: golden values, gradients, and what each loss declares about itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kernels import LOSS_TYPES, preference_loss
from dpo_kernels.losses import LossOptions, check_options, resolve_loss

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
    assert set(LOSS_TYPES) == TRL_LOSSES | {"ipo_sum", "simpo", "orpo", "cpo"}
    assert {name for name, t in LOSS_TYPES.items() if not t.needs_reference} == {"sft", "simpo", "orpo", "cpo"}
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
        ("sigmiod", None, "did you mean 'sigmoid'"),
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
    ],
)
def test_numbers_out_of_range(options: LossOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(options)
