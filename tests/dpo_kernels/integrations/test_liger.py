"""The Liger-shaped class against Liger's own: values, gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dpo_kernels.integrations import versions
from dpo_kernels.integrations.liger import LOSS_TYPES, FusedLinearDPOLoss

P, L, D, V = 3, 9, 16, 37
SMOOTHED = {"exo_pair": 0.05, "robust": 0.1}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""Of values; of gradients relative to the largest entry, since small ones are differences of large products."""


class Case:
    """Inputs of one call; gradients are those of the last call of ``run``."""

    def __init__(self, *, bias=False, reference=True, ref_bias=False, frozen=(), ignore_index=-100, chosen=0.7):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.arguments = {
            "lin_weight": normal(V, D) * 0.5,
            "_input": normal(2 * P, L, D),
            "bias": normal(V) if bias else None,
        }
        for name, tensor in self.arguments.items():
            if tensor is not None and name not in frozen:
                tensor.requires_grad_()
        target = torch.randint(V, (2 * P, L), generator=generator)
        target[torch.rand(2 * P, L, generator=generator) > chosen] = ignore_index
        target[:, 0] = ignore_index
        target[:, 1] = 5
        self.arguments["target"] = target
        if reference:
            self.arguments |= {"ref_input": normal(2 * P, L, D + 2), "ref_weight": normal(V, D + 2) * 0.5}
            if ref_bias:
                self.arguments["ref_bias"] = normal(V)

    def run(self, loss_module, upstream=1.0):
        """((loss, *outputs), gradients of lin_weight, _input and bias)."""
        leaves = [t for t in (self.arguments[name] for name in ("lin_weight", "_input", "bias")) if t is not None]
        loss, outputs = loss_module(**self.arguments)
        for output in outputs:
            assert not output.requires_grad
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(loss * upstream, leaves) if leaves else ()
        return (loss.detach(), *outputs), grads


def assert_like_liger(case: Case, upstream=1.0, **options) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    expected, expected_grads = case.run(liger.LigerFusedLinearDPOLoss(compiled=False, **options), upstream)
    values, grads = case.run(FusedLinearDPOLoss(compiled=False, **options), upstream)
    assert len(values) == len(expected)
    for value, want in zip(values, expected, strict=True):
        assert_close(value, want, **TOLERANCE)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert_close(grad, want, rtol=1e-5, atol=1e-6 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type):
    assert_like_liger(
        Case(bias=True, ref_bias=True),
        loss_type=loss_type,
        label_smoothing=SMOOTHED.get(loss_type, 0.0),
        beta=0.3,
        compute_nll_loss=True,
        alpha=0.7,
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "sppo_hard", "discopop"])
@pytest.mark.parametrize("nll", [False, True])
def test_average_log_prob(loss_type, nll):
    assert_like_liger(
        Case(bias=True),
        loss_type=loss_type,
        label_smoothing=SMOOTHED.get(loss_type, 0.0),
        average_log_prob=True,
        compute_nll_loss=nll,
        beta=2.0,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"bias": True, "ref_bias": False},
        {"reference": False},
        {"frozen": ("lin_weight",)},
        {"bias": True, "frozen": ("lin_weight", "bias")},
        {"frozen": ("_input",)},
        {"frozen": ("_input", "lin_weight")},
        {"ignore_index": -1},
        {"chosen": 0.0},
    ],
    ids=str,
)
def test_inputs(options):
    ignore_index = options.get("ignore_index", -100)
    assert_like_liger(Case(**options), use_ref_model=options.get("reference", True), ignore_index=ignore_index)


def test_chunk_size_changes_nothing():
    assert_like_liger(Case(), chunk_size=2, discopop_tau=0.2, loss_type="discopop")


@pytest.mark.parametrize("average", [False, True])
def test_any_upstream_gradient(average):
    assert_like_liger(Case(bias=True), upstream=-3.5, average_log_prob=average, compute_nll_loss=True)


@pytest.mark.parametrize("average", [False, True])
def test_sequences_without_tokens(average):
    case = Case()
    case.arguments["target"][:] = -100
    loss_module = FusedLinearDPOLoss(average_log_prob=average, compute_nll_loss=True)
    (loss, chosen, rejected, _, _, nll, *_), grads = case.run(loss_module)
    assert_close(loss, torch.tensor(2.0).log(), **TOLERANCE)
    assert not any(tensor.any() for tensor in (chosen, rejected, nll, *grads))


def test_input_need_not_be_contiguous():
    case = Case()
    straight = case.run(FusedLinearDPOLoss())
    for name in ("_input", "ref_input"):
        tensor = case.arguments[name]
        padded = torch.cat((tensor, tensor), dim=1).detach()[:, :L]
        case.arguments[name] = padded.requires_grad_(tensor.requires_grad)
    assert_close(case.run(FusedLinearDPOLoss()), straight, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    case = Case()
    case.arguments = {
        name: t.detach().to(dtype) if t.is_floating_point() else t
        for name, t in case.arguments.items()
        if t is not None
    }
    rounded = {name: t.float() if t.is_floating_point() else t for name, t in case.arguments.items()}
    loss, _ = FusedLinearDPOLoss()(**case.arguments)
    expected, _ = FusedLinearDPOLoss()(**rounded)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type must be one of sigmoid.*got 'ipo'"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "must be 0 with loss_type 'sigmoid'"),
        ({"loss_type": "exo_pair"}, "positive label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau must be positive"),
    ],
)
def test_options_that_cannot_be_honoured(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_input": None}, "needs ref_input and ref_weight"),
        ({"_input": torch.zeros(2 * P * L, D)}, r"_input must have shape"),
        ({"target": torch.zeros(2 * P, L - 1, dtype=torch.int64)}, r"_input must have shape"),
        ({"_input": torch.zeros(3, L, D), "target": torch.zeros(3, L, dtype=torch.int64)}, "got 3 sequences"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    arguments = Case().arguments | change
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss()(**arguments)


def test_refuses_other_series(monkeypatch):
    monkeypatch.setattr(versions, "installed_version", lambda name: "0.9.0")
    with pytest.raises(
        ImportError, match=r"liger-kernel 0\.8 only, got 0\.9\.0: pip install 'liger-kernel>=0\.8,<0\.9'"
    ):
        FusedLinearDPOLoss()


def test_works_without_liger(monkeypatch):
    monkeypatch.setattr(versions, "installed_version", lambda name: None)
    assert torch.isfinite(Case().run(FusedLinearDPOLoss())[0][0])
