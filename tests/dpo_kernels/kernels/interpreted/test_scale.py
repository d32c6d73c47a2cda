"""A tensor times one number of the device, and what is not touched when that number is 1."""

from __future__ import annotations

import pytest
import torch

from dpo_kernels import linear_dpo_loss
from dpo_kernels.kernels import scale
from dpo_kernels.kernels.scale import BLOCK, STEPS, scale_


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0, 1, 5000, BLOCK * STEPS + 3])
def test_products_are_rounded_once(dtype, size):
    """The interpreter rounds bfloat16 towards 0, a GPU to nearest."""
    values, factor = torch.randn(size).to(dtype), torch.tensor(0.3)
    found = scale_(values.clone(), factor)
    torch.testing.assert_close(found.double(), values.double() * factor, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_factor_of_one_changes_no_bit_and_others_reach_what_is_not_finite():
    values = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45, 3.0])
    assert torch.equal(scale_(values.clone(), torch.tensor(1.0)).view(torch.int32), values.view(torch.int32))
    assert scale_(values.clone(), torch.tensor(torch.nan)).isnan().all()
    assert torch.equal(scale_(torch.ones(3), torch.tensor(0.0)), torch.zeros(3))


@pytest.mark.parametrize("upstream", [1.0, -0.7])
def test_gradients_of_the_loss_are_scaled_by_the_kernel(upstream, monkeypatch):
    hidden, weight, labels = torch.randn(7, 16), torch.randn(40, 16), torch.randint(0, 40, (7,))
    seen = []
    launch = scale.scale_kernel.run
    monkeypatch.setattr(scale.scale_kernel, "run", lambda *a, **k: seen.append(a[0].shape) or launch(*a, **k))
    found = []
    for impl in ("reference", "triton"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = linear_dpo_loss(*leaves, labels, torch.tensor([0, 3, 7]), torch.zeros(2), impl=impl).loss
        (loss * upstream).backward()
        found.append([leaf.grad for leaf in leaves])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert seen == [hidden.shape, weight.shape]
