"""float16 holds no more than 65504 and loses what is below 6e-5: slopes of the logits, of losses and upstream."""

from __future__ import annotations

import importlib

import pytest
import torch

from dpo_kernels import linear_dpo_loss, linear_logps
from dpo_kernels.chunks import plan_chunks
from dpo_kernels.losses import LOSS_TYPES
from tests.dpo_kernels.kernels.interpreted.twin import assert_as_good, rounding

triton_tiles = importlib.import_module("dpo_kernels.linear_logps.triton_tiles")
triton_pairs = importlib.import_module("dpo_kernels.linear_dpo.triton_pairs")
SLOPES = [0.01, 1.0, 2.9, 3.1, 30.0]
V = 512


@pytest.fixture(autouse=True)
def narrow_slices(monkeypatch):
    monkeypatch.setattr(triton_tiles, "SLICE_BYTES", 0)
    monkeypatch.setattr(triton_tiles, "MIN_SLICE", 256)


def growing(slope: float, rise: float, rows: int = 6, D: int = 16) -> tuple[torch.Tensor, ...]:
    """Rows whose logits rise by ``rise`` from slice to slice: within the slack a tile keeps the shift of its row."""
    hidden, weight = torch.randn(rows, D).half(), (0.2 * torch.randn(V, D) / slope).half()
    bias = (torch.arange(V).div(256, rounding_mode="floor") * rise / slope).half()
    return hidden, weight, torch.randint(0, V, (rows,)), bias


def gradients(impl, inputs, frozen, dtype, function, upstream: float = 1.0, **options) -> list[torch.Tensor]:
    """The result, and gradients of hidden states and, unless it is frozen, of the weight."""
    hidden, weight, labels, bias = inputs
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
    out = function(*leaves, labels, impl=impl, bias=bias.to(dtype), **options)
    return [out.detach(), *torch.autograd.grad(out.sum() * upstream, leaves[: 2 - frozen])]


def compare(inputs, frozen: bool, function, **options) -> None:
    exact = gradients("reference", inputs, frozen, torch.float64, function, **options)
    if function is summed_loss:
        # The gradient waits for its upstream factor in float32: what comes of it has to fit, not what is on the way.
        options["upstream"] = 1 / max(gradient.abs().max().item() for gradient in exact[1:])
        exact[1:] = [gradient * options["upstream"] for gradient in exact[1:]]
    rival = gradients("torch", inputs, frozen, torch.float16, function, **options)
    got = gradients("triton", inputs, frozen, torch.float16, function, **options)
    assert_as_good(got[0], rival[0], exact[0], 2e-6)
    for value, other, expected in zip(got[1:], rival[1:], exact[1:], strict=True):
        assert value.isfinite().all()
        assert_as_good(value, other, expected, 4 * rounding(torch.float16))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("rise", [9.5, 30.0])
@pytest.mark.parametrize("slope", SLOPES)
def test_logits_that_rise_from_slice_to_slice(slope, rise, frozen):
    inputs = growing(slope, rise)
    compare(inputs, frozen, linear_logps, temperature=1 / slope)
    compare(inputs, frozen, linear_logps, logit_scale=slope)
    compare(inputs, frozen, linear_logps, logit_scale=slope, softcap=4 * rise)


def summed_loss(hidden, weight, labels, **options):
    cu = torch.tensor([0, 1, 3, 5, 6])
    ref = torch.zeros(4) if LOSS_TYPES[options["loss_type"]].needs_reference else None
    return linear_dpo_loss(hidden, weight, labels, cu, ref, reduction="sum", **options).loss


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo_sum", "sppo_hard", "sft"])
@pytest.mark.parametrize("slope", [0.01, 3.1, 30.0])
@pytest.mark.parametrize(("rows", "rows_of_pair"), [(99, 99), (3, 99), (2, 1)], ids=["a chunk", "chunks", "split"])
def test_paired_losses(slope, loss_type, rows, rows_of_pair, monkeypatch):
    """Slopes of a loss from 1e-6 to 1e7, and pairs whose slopes are far from each other's, in either order."""
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: rows)
    monkeypatch.setattr(triton_pairs, "plan_chunks", lambda cu, rows, _: plan_chunks(cu, rows, rows_of_pair))
    inputs = growing(slope, 9.5)
    for beta, weights in ((1e-5, (100.0, 0.01)), (0.1, (1e-5, 1e-3))):
        options = {"loss_type": loss_type, "beta": beta, "pair_weights": torch.tensor(weights)}
        compare(inputs, False, summed_loss, logit_scale=slope, **options)


@pytest.mark.parametrize(("slope", "rise"), [(1e-4, 0.5), (1e5, 0.0)])
@pytest.mark.parametrize(("rows", "rows_of_pair"), [(99, 99), (2, 1)], ids=["a chunk", "split"])
def test_slopes_of_logits_that_float16_has_no_room_for(slope, rise, rows, rows_of_pair, monkeypatch):
    """A split pair, whose slope is not known yet, forms a gradient of order 1 like any other."""
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: rows)
    monkeypatch.setattr(triton_pairs, "plan_chunks", lambda cu, rows, _: plan_chunks(cu, rows, rows_of_pair))
    compare(growing(slope, rise), False, summed_loss, logit_scale=slope, loss_type="sigmoid")
