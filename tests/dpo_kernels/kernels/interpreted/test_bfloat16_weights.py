"""The bits of the kernels are those of torch's operators, which are the reference."""

from __future__ import annotations

import random

import pytest
import torch

from dpo_kernels.kernels import bfloat16_weights
from dpo_kernels.kernels.bfloat16_weights import BLOCK
from engine.train import bfloat16

EXTREMES = [0x00000000, 0x00000001, 0x0000FFFF, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000]
EXTREMES += [0x3F808000, 0x3F818000, 0x7F7F0000, 0x7F7F0001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000]
EXTREMES += [0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF]
"""Bits of zero, the smallest numbers, halves, the largest numbers, infinity and NaN; all of them also below zero."""


@pytest.fixture(params=[0, 1, 2, 77, BLOCK, 3 * BLOCK + 5])
def values(request) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request.param)
    drawn = torch.randint(0, 1 << 32, (request.param,), generator=generator)
    extremes = torch.tensor([sign | bits for bits in EXTREMES for sign in (0, 1 << 31)])
    places = torch.randperm(len(drawn), generator=generator)[: len(extremes)]
    drawn[places] = extremes[: len(places)]
    return (drawn - (drawn >> 31 << 32)).int().view(torch.float32)


def kernel_round(values, key, start, update):
    """To memory that held something else."""
    target = torch.full_like(values, torch.nan, dtype=torch.bfloat16)
    mixing = {"rounds": bfloat16.ROUNDS, "turned": bfloat16.turned(update)}
    bfloat16_weights.stochastic_round(target, values, key=key, start=start, **mixing)
    return target


def assert_same_bits(found, expected):
    """But for the payload of a NaN, which torch gives in different forms to vectors and to what is left of them."""
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[number], expected.view(torch.int16)[number])


def test_rounded_at_random(values):
    drawn = random.Random(0)
    keys = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, *(drawn.getrandbits(32) for _ in range(7))]
    starts = [0, 1, 250, (1 << 31) - 3, 1 << 31, (1 << 32) - 1, (1 << 32) + 5, (1 << 40) + 12_345]
    for key in keys:
        start, update = drawn.choice(starts), drawn.choice([0, 1, 2, drawn.getrandbits(20), (1 << 40) + 7])
        expected = torch.empty_like(values, dtype=torch.bfloat16)
        bfloat16.round_at_random(expected, values, key=key, start=start, update=update)
        assert_same_bits(kernel_round(values, key, start, update), expected)


@pytest.mark.parametrize("start", [0, (1 << 31) - 1000, (1 << 32) - 1000, (1 << 40) + 17])
def test_parts_are_rounded_as_in_the_whole_and_again(start):
    values = torch.randn(BLOCK + 1000, generator=torch.Generator().manual_seed(1))
    whole = kernel_round(values, 7, start, 3)
    cut = 1234
    parts = [kernel_round(values[:cut], 7, start, 3), kernel_round(values[cut:], 7, start + cut, 3)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(kernel_round(values, 7, start, 3), whole)
    assert not torch.equal(kernel_round(values, 7, start, 4), whole)


def test_split_and_joined(values):
    outputs = []
    for split in (bfloat16.split, bfloat16_weights.split):
        target, remainder = torch.ones_like(values, dtype=torch.bfloat16), torch.ones_like(values, dtype=torch.int16)
        split(target, remainder, values)
        outputs.append((target.view(torch.int16), remainder))
        joined = torch.full_like(values, 3.0)
        bfloat16_weights.join(joined, target, remainder)
        assert torch.equal(joined.view(torch.int32), bfloat16.joined(target, remainder).view(torch.int32))
    for expected, found in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
