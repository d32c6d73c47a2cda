"""The kernels' backward into an existing gradient of the weight."""

from __future__ import annotations

import importlib

import pytest
import torch

from dpo_kernels import linear_logps

triton_tiles = importlib.import_module("dpo_kernels.linear_logps.triton_tiles")


def test_adds_to_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "SLICE_BYTES", 1)
    monkeypatch.setattr(triton_tiles, "MIN_SLICE", 64)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(150, 16, requires_grad=True)
    labels, upstream = torch.randint(0, 150, (9,)), torch.randn(9)
    expected = torch.autograd.grad(linear_logps(hidden, weight, labels, impl="reference"), weight, upstream)[0]
    main_grad = torch.ones(150, 16)
    linear_logps(hidden, weight, labels, impl="triton", weight_grad=main_grad).backward(upstream)
    torch.testing.assert_close(main_grad, expected + 1, rtol=1e-4, atol=1e-4)
    assert weight.grad is None
