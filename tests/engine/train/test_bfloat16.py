from __future__ import annotations

import pytest
import torch

from engine.train.bfloat16 import carried, counted_noise, joined, noise_key, round_at_random, split

CPU = torch.device("cpu")


def noise(key: int, start: int, count: int) -> torch.Tensor:
    return counted_noise(key, start, count, CPU)


def test_noise_is_uniform_and_independent_of_its_neighbours():
    values = noise(noise_key(42, 1, "weight"), 0, 1 << 20)
    assert values.dtype == torch.int32
    counts = torch.bincount(values >> 8, minlength=256).double()
    # 4,096 are expected in each of 256 bins; five standard deviations are 320.
    assert (counts - 4096).abs().max() < 320
    for shift in (1, 2, 64, 4096):
        assert torch.corrcoef(torch.stack([values[shift:], values[:-shift]]).double())[0, 1].abs() < 5e-3


@pytest.mark.parametrize("other", [("seed", 2, "weight"), ("seed", 1, "bias"), ("seeds", 1, "weight")])
def test_noise_of_another_step_name_or_seed_is_another(other):
    one, two = (noise(noise_key(*parts), 0, 1 << 16).double() for parts in (("seed", 1, "weight"), other))
    assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 2e-2


def test_a_part_of_a_tensor_gets_the_noise_that_it_has_in_the_whole():
    whole = noise(7, 0, 1000)
    assert torch.equal(torch.cat([noise(7, start, 250) for start in range(0, 1000, 250)]), whole)
    # Beyond 32 bits the place wraps around.
    assert noise(7, (1 << 32) + 5, 10).tolist() == noise(7, 5, 10).tolist()


def test_rounding_goes_to_a_neighbour_and_keeps_the_expectation():
    exact = torch.tensor([1.0, -1.0, 0.37, -3.1e-5, 1e-30, 65000.0, 1 + 2**-10])
    many = exact.repeat(20_000)
    target = torch.empty_like(many, dtype=torch.bfloat16)
    round_at_random(target, many, key=noise_key(0), start=0)
    got = target.float().view(-1, len(exact))
    gap = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((got - exact).abs() <= gap).all()
    assert torch.equal(got[:, :2], exact[:2].expand(len(got), 2))
    # Five standard errors of a mean of 20,000 values that are up to half a gap away.
    assert ((got.double().mean(0) - exact).abs() <= 5 * gap / 2 / 20_000**0.5).all()


def test_what_is_split_is_joined_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=generator, dtype=torch.int64).int()
    values = bits.view(torch.float32)
    # Halves, in both directions and of both signs.
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values[values.isfinite()], halves, -halves, torch.tensor([0.0, -0.0, 1e-45])])
    target, remainder = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    split(target, remainder, values)
    assert torch.equal(joined(target, remainder).view(torch.int32), values.view(torch.int32))
    nearest = values.bfloat16()
    tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(target[~tie], nearest[~tie])


def test_what_is_not_finite_stays_so():
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), largest])
    got = carried(values, torch.full((4,), 0xFFFF, dtype=torch.int32))
    assert torch.equal(got.isnan(), values.isnan())
    assert got[:2].tolist() == values[:2].tolist()
