"""Float32 values in the 16 bits of bfloat16: rounded at random without bias, or with what rounding leaves kept.

bfloat16 is the upper half of float32. Numbers near a weight lie 2^-8 of it apart, farther than an update at a low
learning rate moves it, so that rounding to nearest would leave most weights where they are.

The noise of stochastic rounding is counted, not drawn: it depends on a key, on the place of an element in the whole
tensor and on the number of the update, and so neither on what was drawn before, nor on the device, nor on how the
tensor is spread over processes.

Over updates the noise of an element goes around its range in steps of the golden ratio, from a random start. At each
update it is uniform, as independent draws are, so that a result has the same expectation. But any updates in a row have
it spread evenly over the range: what one of them rounds up too far, those after it round down. Errors of independent
draws add up to a random walk, these stay within a few distances of numbers.

The operators of torch here say what is meant, and run on the CPU. On a GPU with Triton one kernel a tensor gives the
same bits (``dpo_kernels/kernels/bfloat16_weights.py``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from hashlib import blake2b
from types import ModuleType

import torch
from torch import Tensor

_UPPER, _LOWER, _HALF = -(1 << 16), (1 << 16) - 1, 1 << 15
_32_BITS = (1 << 32) - 1
PIECE = 1 << 22
"""Elements that operators of torch work on at a time: what is held beside a tensor stays small."""
ROUNDS = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1))
"""Shifts and factors of a mixing of 32 bits (https://github.com/skeeto/hash-prospector). Factors below 2^31 keep the
products of 64-bit integers exact."""
_GOLDEN = 0x9E3779B9
"""The golden ratio's part behind the point, in 32 bits: of all steps around a circle the one that spreads best."""


def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels that do on a device what is done here; None where operators of torch do it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from dpo_kernels.kernels import bfloat16_weights
    from dpo_kernels.kernels.launch import obstacle

    return bfloat16_weights if obstacle(device, torch.bfloat16) is None else None


def carried(values: Tensor, noise: Tensor) -> Tensor:
    """Float32 values, rounded to numbers of bfloat16.

    Args:
        values: float32.
        noise: int32, uniform in [0, 2^16): a value goes up in magnitude as often as its lower half is large, so that
            its expectation is kept. What is a number of bfloat16 already stays as it is.
    """
    rounded = ((values.view(torch.int32) + noise) & _UPPER).view(torch.float32)
    finite = values.isfinite() & rounded.isfinite()
    return torch.where(finite, rounded, values.bfloat16().float())


def noise_key(*parts: int | str) -> int:
    """32 bits that stand for some numbers and names."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little")


def counted_noise(key: int, start: int, count: int, device: torch.device, *, update: int = 0) -> Tensor:
    """int32 [count] in [0, 2^16), of the elements from ``start`` on at an update."""
    mixed = torch.arange(start, start + count, device=device).bitwise_xor_(key).bitwise_and_(_32_BITS)
    for shift, factor in ROUNDS:
        mixed.bitwise_xor_(mixed >> shift).mul_(factor).bitwise_and_(_32_BITS)
    return mixed.add_(turned(update)).bitwise_and_(_LOWER).int()


def turned(update: int) -> int:
    """How far noise has gone around its range at an update."""
    return (update * _GOLDEN & _32_BITS) >> 16


def round_at_random(target: Tensor, values: Tensor, *, key: int, start: int, update: int = 0) -> None:
    """Write float32 ``values`` to ``target``, bfloat16 of the same shape, up or down with the probability that keeps
    their expectation.

    Args:
        key: from ``noise_key``.
        start: place of the first element in the whole tensor, of which these are a part.
        update: how many times the tensor was rounded with this key before.
    """
    if (kernels := kernels_for(target.device)) is not None:
        kernels.stochastic_round(target, values, key=key, start=start, turned=turned(update), rounds=ROUNDS)
        return
    for begin, (into, part) in _pieces(target, values):
        into.copy_(carried(part, counted_noise(key, start + begin, part.numel(), part.device, update=update)))


def split(target: Tensor, remainder: Tensor, values: Tensor) -> None:
    """Write float32 ``values`` to ``target``, bfloat16, rounded to nearest, and what that leaves to ``remainder``.

    Args:
        remainder: int16: the difference in units of the last place of float32, so that ``joined`` gives ``values`` back
            to the bit. A bfloat16 compensation, as Kahan's summation has it, takes as much and holds 8 bits of it.
    """
    if (kernels := kernels_for(target.device)) is not None:
        kernels.split(target, remainder, values)
        return
    for _, (into, rest, part) in _pieces(target, remainder, values):
        bits = part.view(torch.int32)
        # Halves go up in magnitude, so that the difference fits into 16 bits.
        upper = (bits + _HALF) >> 16
        into.view(torch.int16).copy_(upper)
        rest.copy_(bits - (upper << 16))


def joined(target: Tensor, remainder: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 values that ``split`` was given, written to ``out`` where there is one."""
    values = torch.empty_like(target, dtype=torch.float32) if out is None else out
    if (kernels := kernels_for(target.device)) is not None:
        kernels.join(values, target, remainder)
        return values
    for _, (into, part, rest) in _pieces(values, target, remainder):
        into.view(torch.int32).copy_((part.view(torch.int16).int() << 16) + rest)
    return values


def _pieces(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Where each piece begins, and the same piece of all the tensors, which are contiguous."""
    flat = [tensor.view(-1) for tensor in tensors]
    for begin in range(0, flat[0].numel(), PIECE):
        yield begin, tuple(tensor[begin : begin + PIECE] for tensor in flat)
