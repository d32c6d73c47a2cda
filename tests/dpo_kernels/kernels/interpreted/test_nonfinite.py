"""nan and infinities come out of every implementation where they come out of the reference, and nowhere else."""

from __future__ import annotations

import importlib

import pytest
import torch

from dpo_kernels import linear_dpo_loss, linear_logps
from tests.dpo_kernels.kernels.interpreted.twin import IGNORED

triton_tiles = importlib.import_module("dpo_kernels.linear_logps.triton_tiles")
D, V = 8, 130
LABELS = torch.tensor([3, 100, IGNORED, 129, 3])


@pytest.fixture(autouse=True)
def narrow_slices(monkeypatch):
    monkeypatch.setattr(triton_tiles, "SLICE_BYTES", 0)
    monkeypatch.setattr(triton_tiles, "MIN_SLICE", 64)


def log_probs(impl, leaves, *, frozen, **options):
    hidden, weight, bias = (leaf.requires_grad_(not frozen or i == 0) for i, leaf in enumerate(leaves))
    logps = linear_logps(hidden, weight, LABELS, bias=bias, impl=impl, **options)
    return logps.detach(), torch.autograd.grad(logps.sum(), leaves[: 1 if frozen else 3])


def paired_loss(impl, leaves, **options):
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    cu, ref = torch.tensor([0, 1, 3, 4, 5]), torch.zeros(4)
    out = linear_dpo_loss(hidden, weight, LABELS, cu, ref, bias=bias, impl=impl, reduction="sum", **options)
    return torch.cat([out.pair_losses, out.logps]), torch.autograd.grad(out.loss, leaves)


CALLS = {
    "frozen head": lambda *given, **options: log_probs(*given, frozen=True, **options),
    "trained head": lambda *given, **options: log_probs(*given, frozen=False, **options),
    "paired loss": paired_loss,
}


def spoiled(place: str, value: float) -> list[torch.Tensor]:
    hidden, weight, bias = torch.randn(5, D), torch.randn(V, D), torch.zeros(V)
    where = {"hidden": (hidden, (1, 2)), "weight": (weight, (70, 2)), "a bias": (bias, 70), "a label's": (bias, 100)}
    if place in where:
        tensor, index = where[place]
        tensor[index] = value
    else:
        bias[:] = value
        bias[100] = 0
    return [hidden, weight, bias]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("place", ["hidden", "weight", "a bias", "a label's", "all but a label's"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_like_the_reference(value, place, softcap, call):
    inputs = spoiled(place, value)
    expected, expected_gradients = CALLS[call]("reference", [t.clone() for t in inputs], softcap=softcap)
    used = LABELS != IGNORED
    for impl in ("triton", "torch"):
        got, gradients = CALLS[call](impl, [t.clone() for t in inputs], softcap=softcap)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        for i, (found, other) in enumerate(zip(gradients, expected_gradients, strict=True)):
            # Ignored rows are 0 whatever they hold. Where a softcap saturates, a slope may be 0 or a rounding unit:
            # times infinity nan, or infinity.
            rows = used if i == 0 else slice(None)
            assert torch.equal(found[rows].isfinite(), other[rows].isfinite()), impl
