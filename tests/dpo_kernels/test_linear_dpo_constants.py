"""``linear_dpo_loss`` with weights of tokens, target margins and other divergences, against the plain composition."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import LOSS_TYPES, chunks, ld_token_weights, linear_dpo_loss
from dpo_kernels.linear_dpo import ops, pair_chunks
from tests.dpo_kernels.linear_dpo_setup import IMPLS, LOSSES, Case, compose, results, upstream_of
from tests.dpo_kernels.native_setup import NATIVE

LONG = RESPONSE_LENGTHS["a long pair between short ones"]
WITH_MARGINS = [name for name, t in LOSS_TYPES.items() if t.takes_margins]
WITH_DIVERGENCE = [name for name, t in LOSS_TYPES.items() if t.takes_divergence]


def compare(case: Case, impl: str, trained=(1, 1, 1), upstream=None, tolerance=None, **options) -> None:
    upstream = upstream_of(case, options.get("reduction", "mean")) if upstream is None else upstream
    leaves = case.leaves(torch.float64, trained)
    expected = results(compose(case, leaves, **options), leaves, upstream.double())
    leaves = case.leaves(trained=trained)
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl=impl, **options)
    found = [t.double() for t in results(out, leaves, upstream)]
    torch.testing.assert_close(found, expected, **({} if tolerance is None else {"rtol": tolerance, "atol": tolerance}))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
def test_weights_of_tokens(loss_type, reduction: str, impl: str) -> None:
    """Every loss; likelihood terms read tokens without weights."""
    case = Case(RESPONSE_LENGTHS["uneven"])
    given = {"token_weights": case.token_weights, "pair_weights": case.pair_weights, "softcap": 4.0}
    compare(case, impl, loss_type=loss_type, reduction=reduction, beta=0.3, **given)


@pytest.mark.parametrize("trained", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_weights_of_tokens_with_frozen_inputs(trained) -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    for loss_type in ("sigmoid", ("sigmoid", "nll")):
        compare(case, "torch", trained, loss_type=loss_type, token_weights=case.token_weights)


@pytest.mark.parametrize("impl", ["torch", *NATIVE])
@pytest.mark.parametrize("lengths", [LONG, (3, 2, 40, 30, 1, 6)])
def test_weights_of_tokens_of_pairs_longer_than_the_buffer(lengths, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(lengths, D=3, V=11, dtype=torch.float64 if impl == "torch" else torch.float32)
    monkeypatch.setattr(pair_chunks, "BUFFER_BYTES", 10 * 11 * case.hidden.element_size())
    assert any(chunk.split for chunk in chunks.plan_chunks(case.cu.tolist(), 10, 3))
    given = {"token_weights": case.token_weights, "margins": case.margins}
    compare(case, impl, loss_type="sigmoid", tolerance=None if impl == "torch" else 1e-4, **given)


@pytest.mark.parametrize("impl", [*IMPLS, *NATIVE])
def test_target_margins(impl: str) -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], dtype=torch.float32 if impl in NATIVE else torch.float64)
    tolerance = 1e-4 if impl in NATIVE else None
    for name in WITH_MARGINS:
        compare(case, impl, loss_type=(name, "nll"), margins=case.margins, beta=0.4, tolerance=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences(kind: str, impl: str) -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    case.hidden = case.hidden / 8
    for name in WITH_DIVERGENCE:
        compare(case, impl, loss_type=name, f_divergence_type=kind, f_alpha_divergence_coef=0.3, beta=0.4)


def test_three_products_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token weights take the fused path, and leave it only beside a likelihood term."""
    case, calls = Case(RESPONSE_LENGTHS["uneven"]), []
    monkeypatch.setattr("dpo_kernels.linear_dpo.api.linear_dpo_op", lambda *a: calls.append(a) or ops.linear_dpo_op(*a))
    for loss_type, fused in (("sigmoid", 1), ("ipo", 1), (("sigmoid", "nll"), 0)):
        leaves = case.leaves()
        options = {"loss_type": loss_type, "token_weights": case.token_weights}
        linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, **options)
        assert len(calls) == fused
        calls.clear()


def test_ones_change_no_bit_and_zeros_leave_a_token_out() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], ignored=False)
    ones = torch.ones_like(case.token_weights)

    def gradients(labels, **options):
        leaves = case.leaves(trained=(1, 1, 0))
        out = linear_dpo_loss(*leaves[:2], labels, case.cu, case.ref, **options)
        return torch.autograd.grad(out.loss, leaves[:2])

    for got, want in zip(gradients(case.labels, token_weights=ones), gradients(case.labels), strict=True):
        assert torch.equal(got, want)
    masked = case.labels.clone()
    masked[::3], ones[::3] = -100, 0
    torch.testing.assert_close(gradients(case.labels, token_weights=ones), gradients(masked))


def test_weights_of_the_longer_response() -> None:
    """LD-DPO: what exceeds the length of the shorter response counts alpha."""
    cu = torch.tensor([0, 2, 6, 9, 10, 10, 12])
    want = [1, 1, 1, 1, 0.3, 0.3, 1, 0.3, 0.3, 1, 0.3, 0.3]
    assert ld_token_weights(cu, 0.3).tolist() == torch.tensor(want).tolist()
    with pytest.raises(ValueError, match=r"ld_alpha must be in \[0, 1\]; got 1.5"):
        ld_token_weights(cu, 1.5)


def test_constants_that_do_not_fit_are_refused() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    leaves = case.leaves()
    rows, pairs = len(case.hidden), len(case.ref) // 2
    for name, size, of in (
        ("pair_weights", pairs, "pair"),
        ("margins", pairs, "pair"),
        ("token_weights", rows, "row of hidden"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must have shape \[{size}\], one per {of}; got \[2\]"):
            linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, **{name: torch.ones(2)})
