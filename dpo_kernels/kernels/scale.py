"""A tensor times one number that is known on the device alone: gradients times what comes from upstream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import COMPILATION, on_device

BLOCK = 4096
STEPS = 16
"""Blocks of a program: few programs, as most runs have nothing for them to do."""


@triton.jit(do_not_specialize=["factor_ptr"])
def scale_kernel(values_ptr, factor_ptr, num_values, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """values *= factor. A factor of 1, as a plain `loss.backward()` has, leaves the values unread."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
        for step in range(STEPS):
            places = first + step * BLOCK + tl.arange(0, BLOCK)
            inside = places < num_values
            values = tl.load(values_ptr + places, mask=inside, other=0.0)
            tl.store(values_ptr + places, (values.to(tl.float32) * factor).to(values.dtype), mask=inside)


def scale_(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """values *= factor in place, rounded once; `values` are contiguous, `factor` is one number on their device."""
    assert values.is_contiguous()
    assert factor.numel() == 1
    if values.numel():
        with on_device(values.device):
            scale_kernel[(triton.cdiv(values.numel(), BLOCK * STEPS),)](
                values, factor, values.numel(), BLOCK=BLOCK, STEPS=STEPS, num_warps=8, **COMPILATION
            )
    return values
