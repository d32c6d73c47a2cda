"""Weights in bfloat16 and their float32 values: rounded at random, divided into two halves of 16 bits, put together.

Each is one launch that reads and writes every element once, in integers, so that its bits are those of the operators of
torch that say what is meant (``engine/train/bfloat16.py``), but for the payload of a NaN, which has one form here as
where a GPU converts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import COMPILATION, on_device

BLOCK = 2048
"""Elements of a program: each thread has whole vectors of 16 bytes of both dtypes."""


@triton.jit(do_not_specialize=["key", "start", "turned"])
def stochastic_round_kernel(
    target_ptr, values_ptr, key, start, turned, num_values, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """What a noise of 16 bits carries from the lower half of a float32 into the upper one; the noise is a mixing of the
    key with the lower 32 bits of an element's place."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_values
    mixed = ((places.to(tl.int32) + start) ^ key).to(tl.uint32, bitcast=True)
    for r in tl.static_range(len(ROUNDS)):
        mixed = (mixed ^ (mixed >> ROUNDS[r][0])) * ROUNDS[r][1]
    noise = (mixed + turned.to(tl.uint32)) & 0xFFFF
    bits = tl.load(values_ptr + places, mask=inside, other=0).to(tl.uint32, bitcast=True)
    upper = (bits + noise) >> 16
    # What is infinite, or would become so, goes to the nearest number, halves to the even one.
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, nearest)
    finite = ((bits & 0x7F800000) != 0x7F800000) & ((upper & 0x7F80) != 0x7F80)
    tl.store(target_ptr + places, tl.where(finite, upper, nearest).to(tl.int16), mask=inside)


@triton.jit
def split_kernel(upper_ptr, remainder_ptr, values_ptr, num_values, BLOCK: tl.constexpr):
    """The nearest number of bfloat16, halves up in magnitude, and the difference in the last places of float32."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_values
    bits = tl.load(values_ptr + places, mask=inside, other=0)
    upper = (bits + 0x8000) >> 16
    tl.store(upper_ptr + places, upper.to(tl.int16), mask=inside)
    tl.store(remainder_ptr + places, (bits - (upper << 16)).to(tl.int16), mask=inside)


@triton.jit
def join_kernel(values_ptr, upper_ptr, remainder_ptr, num_values, BLOCK: tl.constexpr):
    """What ``split_kernel`` was given."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_values
    upper = tl.load(upper_ptr + places, mask=inside, other=0).to(tl.int32)
    remainder = tl.load(remainder_ptr + places, mask=inside, other=0).to(tl.int32)
    tl.store(values_ptr + places, (upper << 16) + remainder, mask=inside)


def stochastic_round(
    target: torch.Tensor,
    values: torch.Tensor,
    *,
    key: int,
    start: int,
    turned: int,
    rounds: tuple[tuple[int, int], ...],
) -> None:
    """Round float32 `values` to `target`, bfloat16, up where a noise carries.

    Args:
        key: 32 bits; of `start`, the place of the first element, as many count.
        turned: in [0, 2^16), added to the noise.
        rounds: shifts and factors of the mixing.
    """
    _launch(stochastic_round_kernel, [target, values], _signed(key), _signed(start), turned, ROUNDS=rounds)


def split(target: torch.Tensor, remainder: torch.Tensor, values: torch.Tensor) -> None:
    """Write float32 `values` to `target`, bfloat16, and what that leaves to `remainder`, int16."""
    _launch(split_kernel, [target, remainder, values])


def join(values: torch.Tensor, target: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write to `values`, float32, what `split` was given."""
    _launch(join_kernel, [values, target, remainder])


def _launch(kernel: Any, tensors: Sequence[torch.Tensor], *numbers: int, **constants: Any) -> None:
    """Over elements of contiguous tensors of one size, which the kernels take as integers."""
    size = tensors[0].numel()
    assert all(t.is_contiguous() and t.numel() == size for t in tensors)
    if not size:
        return
    words = [t.view(torch.int32 if t.dtype == torch.float32 else torch.int16) for t in tensors]
    with on_device(words[0].device):
        kernel[(triton.cdiv(size, BLOCK),)](
            *words, *numbers, size, BLOCK=BLOCK, num_warps=8, **constants, **COMPILATION
        )


def _signed(number: int) -> int:
    """The lower 32 bits as a signed number: of one dtype to the compiler, whatever it is."""
    low = number & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
