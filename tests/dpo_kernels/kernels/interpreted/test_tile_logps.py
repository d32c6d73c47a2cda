"""Log-probs and log-sum-exps by tiles against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpo_kernels.head import Head
from dpo_kernels.kernels.row_state import RowState, finish_rows, merge_partials
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_logps import empty_exps, score_rows, tile_partials
from tests.dpo_kernels.kernels.interpreted.twin import (
    IGNORED,
    Problem,
    assert_as_good,
    far_rows,
    rounding,
)

SMALL = TileConfig(block_n=32, block_v=64, block_d=16, group_n=2, num_warps=4, num_stages=1)
WIDE = TileConfig(block_n=16, block_v=256, block_d=32, group_n=3, num_warps=4, num_stages=1)
TMA = TileConfig(block_n=32, block_v=64, block_d=16, group_n=2, num_warps=4, num_stages=1, tma=True)


def compare(problem: Problem, config: TileConfig | None = None):
    stats = problem.stats(config)
    exact, lse, *_ = problem.reference()
    rival, rival_lse, *_ = problem.reference(torch.float32)
    assert stats.logps_T.dtype == torch.float32
    assert (stats.logps_T[problem.labels == IGNORED] == 0).all()
    # A few rounding units of the largest logit: two correct fp32 sums differ by as much.
    floor = 4e-7
    scale = lse.detach().abs().max().item()
    assert_as_good(stats.logps_T, rival.detach(), exact.detach(), floor * max(1, scale))
    assert_as_good(stats.lse_T, rival_lse.detach(), lse.detach(), floor)
    return stats


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("config", [None, SMALL, WIDE], ids=["default", "small", "wide"])
def test_vocabularies(V, config):
    compare(Problem.make(19, V), config)


@pytest.mark.parametrize("N", [1, 2, 127, 129])
def test_rows(N):
    compare(Problem.make(N, 130), SMALL)


@pytest.mark.parametrize("D", [1, 7, 16, 33, 64])
def test_features(D):
    compare(Problem.make(9, 70, D), SMALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5, "temperature": 0.7}], ids=["", "all"])
def test_dtypes_and_options(dtype, options):
    compare(Problem.make(21, 150, 40, dtype, bias=bool(options), **options), SMALL)


@pytest.mark.parametrize(
    "options", [{"softcap": 30.0}, {"logit_scale": 0.0625}, {"temperature": 2.5}, {"logit_scale": -1.0}]
)
def test_each_option(options):
    compare(Problem.make(9, 90, **options), SMALL)


def test_tensor_descriptors_change_nothing():
    problem = Problem.make(37, 150, 48)
    pointers, descriptors = compare(problem, SMALL), compare(problem, TMA)
    assert torch.equal(pointers.logps_T, descriptors.logps_T)
    assert torch.equal(pointers.lse_T, descriptors.lse_T)


def test_rows_that_descriptors_cannot_take_are_read_through_pointers():
    compare(Problem.make(9, 70, 7), TMA)


def test_all_rows_ignored():
    problem = Problem.make(5, 70)
    problem.labels[:] = IGNORED
    stats = compare(problem, SMALL)
    assert torch.equal(stats.logps_T, torch.zeros(5))


@pytest.mark.parametrize("label", [0, 63, 64, 127, 128, 149])
def test_labels_at_tile_edges(label):
    problem = Problem.make(3, 150)
    problem.labels[:] = label
    compare(problem, SMALL)


@pytest.mark.parametrize("ignore_index", [-100, -1, 7, 10**12])
def test_any_ignore_index(ignore_index):
    problem = Problem.make(6, 70, ignored=False)
    expected = problem.reference()[0].detach()
    labels = problem.labels.clone()
    labels[2] = ignore_index
    stats = score_rows(problem.hidden, problem.head, labels, ignore_index=ignore_index, config=SMALL)
    kept = torch.arange(6) != 2
    torch.testing.assert_close(stats.logps_T[kept].double(), expected[kept], atol=1e-5, rtol=1e-6)
    assert stats.logps_T[2] == 0


@pytest.mark.parametrize("label", [-1, -7, 70, 71, 2**31 + 3, 2**40, -(2**40)])
def test_a_label_outside_the_vocabulary_reads_nothing_and_is_nan(label):
    problem = Problem.make(6, 70, ignored=False)
    clean = compare(problem, SMALL)
    labels = problem.labels.clone()
    labels[2] = label
    stats = score_rows(problem.hidden, problem.head, labels, ignore_index=IGNORED, config=SMALL)
    assert stats.logps_T[2].isnan()
    others = torch.arange(6) != 2
    assert torch.equal(stats.logps_T[others], clean.logps_T[others])


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_all_logits_far_from_zero(shift):
    problem = Problem.make(5, 150)
    problem.set_bias(torch.full((150,), shift))
    compare(problem, SMALL)


def test_logits_from_minus_to_plus_ten_thousand():
    compare(Problem.make(5, 150, scale=2000.0, ignored=False), SMALL)


def test_a_bias_of_minus_infinity_switches_columns_off():
    """Whole tiles of them, too."""
    problem = Problem.make(5, 200, ignored=False)
    bias = torch.zeros(200)
    bias[:130] = -torch.inf
    problem.set_bias(bias)
    problem.labels = torch.tensor([130, 150, 199, 170, 131])
    compare(problem, SMALL)


def test_confident_rows_keep_their_relative_accuracy():
    """log p near 0 comes from the sum over the other columns, not from a difference of large numbers."""
    weight = torch.tensor([[9.0, 0, 0], [0, 15.0, 0], [0, 0, 20.0]])
    problem = Problem(torch.eye(3), Head(weight), torch.arange(3))
    stats = compare(problem, SMALL)
    torch.testing.assert_close(stats.logps_T.double(), problem.reference()[0].detach(), rtol=1e-5, atol=0)


def test_strided_rows():
    problem = Problem.make(9, 70, 16)
    compact = compare(problem, SMALL)
    problem.hidden = torch.cat([problem.hidden, problem.hidden], dim=1)[:, :16]
    problem.head = Head(torch.cat([problem.weight, problem.weight], dim=0)[::2].contiguous()[:70])
    strided = compare(problem, SMALL)
    assert strided.logps_T.shape == compact.logps_T.shape


def test_two_runs_are_bitwise_equal():
    problem = Problem.make(40, 300, dtype=torch.bfloat16, softcap=5.0)
    first, second = compare(problem, SMALL), compare(problem, SMALL)
    assert torch.equal(first.logps_T, second.logps_T)
    assert torch.equal(first.lse_T, second.lse_T)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_exponentials(config, dtype, softcap):
    """What is left for the gradient: exp(z - shift) times the softcap's part of dz/dbiased, 0 at the label."""
    problem = Problem.make(19, 150, dtype=dtype, softcap=softcap, logit_scale=0.5)
    exps = empty_exps(problem.hidden, 150)
    stats = problem.stats(config, exps=exps)
    columns = torch.arange(150)
    products = problem.hidden.double() @ problem.weight.double().T * 0.5
    z = products if softcap is None else softcap * torch.tanh(products / softcap)
    slope = torch.ones_like(z) if softcap is None else 1 - (z / softcap) ** 2
    shift = stats.tile_shift_JT.double()[columns // stats.width].T
    expected = torch.exp(z - shift) * slope
    expected[columns[None, :] == problem.labels[:, None]] = 0
    assert not exps[:19, :150].isnan().any()
    torch.testing.assert_close(exps[:19, :150].double(), expected, rtol=2 * rounding(dtype) + 3e-6, atol=1e-6)


def test_slices_merge_to_the_whole():
    """Vocabulary slices, as frozen heads and vocabulary-parallel ranks take them; one of them is a single column."""
    problem = Problem.make(11, 301, bias=True)
    state = RowState(*torch.empty(3, 11))
    bounds = [0, 128, 129, 301]
    for start, stop in itertools.pairwise(bounds):
        stats = tile_partials(
            problem.hidden,
            problem.head.columns(slice(start, stop)),
            problem.labels,
            state.label_logit_T,
            first_col=start,
            config=SMALL,
        )
        merge_partials(stats, state, first=start == 0)
    none = stats._replace(shift_JT=stats.shift_JT[:0], sum_JT=stats.sum_JT[:0])
    logps, lse = finish_rows(none, state, problem.labels, V=301, ignore_index=IGNORED, first=False)
    whole = compare(problem, SMALL)
    torch.testing.assert_close(logps, whole.logps_T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, whole.lse_T, rtol=1e-6, atol=1e-6)


def test_offsets_past_two_to_the_31():
    """The second row of hidden states and weight, and later rows of the exponentials, lie beyond 2^31 elements."""
    hidden, weight = far_rows(2, 16, 2**31 + 64), far_rows(2, 16, 2**31 + 64)
    hidden.copy_(torch.randn(2, 16))
    weight.copy_(torch.randn(2, 16))
    compare(Problem(hidden, Head(weight), torch.tensor([1, 0])), SMALL)

    problem = Problem.make(32, 64, 16, torch.float16)
    near, far = empty_exps(problem.hidden, 64), far_rows(32, 64, 2**31 // 30)
    for exps in (near, far):
        problem.stats(SMALL, exps=exps)
    assert torch.equal(far, near[:32, :64])
