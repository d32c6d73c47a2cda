from __future__ import annotations

import importlib.util
from contextlib import nullcontext

import pytest
import torch

from engine.train.bfloat16 import carried, counted_noise, joined, noise_key, round_at_random, split
from tests.pretended_cuda import CUDA, OnDevice, on_host, pretended_cuda

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


@pytest.mark.parametrize("update", [0, 1, 2, 1000, (1 << 40) + 7])
def test_noise_of_an_update_is_that_of_the_first_one_turned(update):
    """So it is uniform where that is, and nothing but the number of the update has to be known for it."""
    first = noise(7, 0, 1000)
    turned = (counted_noise(7, 0, 1000, CPU, update=update) - first) % (1 << 16)
    assert len(turned.unique()) == 1
    assert int(turned[0]) == int(update * (5**0.5 - 1) / 2 % 1 * 2**16) or update > 1000


@pytest.mark.parametrize("count", [1, 2, 3, 8, 55, 200, 1000])
def test_noise_of_updates_in_a_row_is_spread_over_its_range(count):
    """Independent draws would leave gaps of log(count) times their mean distance, and have others fall together."""
    for first in (1, 12_345):
        one = [int(counted_noise(7, 0, 1, CPU, update=first + k)) for k in range(count)]
        places = torch.tensor(sorted(one)).double() / (1 << 16)
        gaps = torch.diff(torch.cat([places, places[:1] + 1]))
        assert gaps.max() <= 2.7 / count + 2**-15
        assert count == 1 or gaps.min() >= 0.38 / count - 2**-15


def drift(independent: bool) -> float:
    """How far weights that move steadily are from float32 ones after many updates, in distances of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(2000, generator=generator).add_(1).bfloat16().float()
    rounded, moves = exact.clone(), torch.rand(2000, generator=generator) * 2**-11
    for update in range(1, 1001):
        exact += moves
        key = noise_key("weight", update if independent else 0)
        target = torch.empty(2000, dtype=torch.bfloat16)
        round_at_random(target, rounded + moves, key=key, start=0, update=0 if independent else update)
        rounded = target.float()
    return ((rounded - exact).pow(2).mean().sqrt() * 2**7).item()


def test_errors_of_many_updates_do_not_add_up():
    assert drift(independent=True) > 4 > 1 > drift(independent=False)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [0, 1, 2, 64, 126, 127, 128, 200, 253])
def test_of_all_noise_the_mean_of_what_is_rounded_is_the_value(exponent, sign):
    """Exactly, also where a number of another exponent is above, and below the smallest normal one."""
    lower = torch.tensor([0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=torch.int32)
    noise = torch.arange(1 << 16, dtype=torch.int32)
    for upper in (0, 1, 0x3F, 0x7E, 0x7F):
        bits = (exponent << 23) | (upper << 16) | lower
        values = bits.view(torch.float32) * sign
        # float64 holds the sum of 2^16 numbers of 8 bits, scaled by a power of two, without rounding.
        got = torch.stack([carried(value.expand(1 << 16), noise).double().mean() for value in values])
        assert torch.equal(got, values.double())


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


@pytest.mark.parametrize("triton", [True, False])
def test_on_a_gpu_each_is_one_kernel_of_the_same_bits(triton, monkeypatch):
    """Without Triton the operators of torch do it there, too."""
    if triton:
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    found = []
    for device in (CPU, CUDA):
        with pretended_cuda() if device == CUDA else nullcontext() as cuda:
            given = OnDevice(values) if cuda else values
            rounded, upper = (torch.zeros(5000, dtype=torch.bfloat16, device=device) for _ in range(2))
            rest = torch.zeros(5000, dtype=torch.int16, device=device)
            if cuda:
                cuda.operations.clear()
            round_at_random(rounded, given, key=1 << 31, start=(1 << 31) - 7, update=5)
            split(upper, rest, given)
            found.append([on_host(t) for t in (rounded, upper, rest, joined(upper, rest))])
    launched = {name: count for name, count in cuda.operations.items() if name.endswith("_kernel")}
    assert launched == (dict.fromkeys(("stochastic_round_kernel", "split_kernel", "join_kernel"), 1) if triton else {})
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(found[1][3], values)
