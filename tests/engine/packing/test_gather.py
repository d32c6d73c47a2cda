"""Gathered rows have the gradient of ``index_select``, added in an order that nothing can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.packing import build_batch
from engine.packing.gather import gather_rows, pick_order
from tests.engine.model.test_attention import random_groups
from tests.unordered_ops import unordered

ROWS = {
    "each once": np.array([2, 0, 1]),
    "some never": np.array([4, 1, 1]),
    "one four times": np.array([3, 0, 3, 1, 3, 3, 1]),
    "all twice": np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
}


def gradient(x: torch.Tensor, rows: np.ndarray, upstream: torch.Tensor) -> torch.Tensor:
    order, counts = pick_order(rows)
    leaf = x.clone().requires_grad_()
    picked = gather_rows(leaf, torch.from_numpy(rows), torch.from_numpy(order), counts)
    assert torch.equal(picked, x[torch.from_numpy(rows)])
    picked.backward(upstream)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_gradient_of_index_select(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    upstream = torch.randn(len(rows), 2, 3, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(x).index_add(0, torch.from_numpy(rows), upstream)
    torch.testing.assert_close(gradient(x, rows, upstream), expected, rtol=1e-15, atol=1e-15)
    for dtype in (torch.float32, torch.bfloat16):
        got = gradient(x.to(dtype), rows, upstream.to(dtype))
        rounded = torch.zeros_like(x).index_add(0, torch.from_numpy(rows), upstream.to(dtype).double())
        assert got.dtype == dtype
        # the sum is exact to float32, so that one rounding to the dtype is left
        torch.testing.assert_close(got.double(), rounded, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_sums_have_the_order_of_the_picks():
    """Three addends of which any other order gives another float32 sum."""
    upstream = torch.tensor([[1e8], [-1e8], [1.0]])
    for shuffle in ([0, 1, 2], [0, 2, 1], [2, 1, 0]):
        in_order = (upstream[shuffle[0]] + upstream[shuffle[1]]) + upstream[shuffle[2]]
        got = gradient(torch.zeros(1, 1), np.zeros(3, dtype=np.int64), upstream[shuffle])
        assert torch.equal(got[0], in_order), shuffle


def test_sums_in_bfloat16_are_rounded_once():
    """To bfloat16, 256 + 1 is 256."""
    upstream = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert gradient(torch.zeros(1, 1).bfloat16(), np.zeros(3, dtype=np.int64), upstream).item() == 258


class Ordered(TorchDispatchMode):
    """Refuses what a GPU does in another order each time."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not unordered(func, args, kwargs or {}), func
        return func(*args, **(kwargs or {}))


def test_keys_of_three_responses_have_ordered_sums():
    batch = build_batch(random_groups())
    assert max(batch.responses_per_group) > 2
    x = torch.randn(batch.num_tokens, 2, 3, requires_grad=True)
    with Ordered():
        batch.plan.gather_keys(x).sum().backward()
        with pytest.raises(AssertionError, match="index_add"):
            x.index_select(0, batch.plan.key_rows).sum().backward()
