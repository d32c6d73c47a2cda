"""Statistics of tokens against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import linear_dpo_loss, linear_logps
from dpo_kernels.head import Head
from dpo_kernels.kernels import tile_logps
from dpo_kernels.kernels.frozen_head import frozen_head
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_logps import score_rows
from dpo_kernels.kernels.token_stats import TOKEN_STATS
from dpo_kernels.linear_dpo import triton_pairs
from dpo_kernels.linear_logps.reference import logits, token_stats
from dpo_kernels.linear_logps.stats import STATS
from tests.dpo_kernels.kernels.interpreted.twin import IGNORED, Problem
from tests.dpo_kernels.linear_dpo_setup import Case
from tests.dpo_kernels.test_token_stats import definition

SMALL = TileConfig(block_n=32, block_v=64, block_d=16, group_n=2, num_warps=4, num_stages=1)
WIDE = TileConfig(block_n=16, block_v=256, block_d=32, group_n=3, num_warps=4, num_stages=1)


def expected(problem: Problem) -> torch.Tensor:
    bias = None if problem.head.bias_V is None else problem.head.bias_V.double()
    head = problem.head._replace(weight_VD=problem.weight.double(), bias_V=bias)
    z = logits(problem.hidden.double(), head)
    return token_stats(z, problem.labels, IGNORED, TOKEN_STATS)


def compare(problem: Problem, config: TileConfig = SMALL, atol: float = 3e-6):
    common = {"ignore_index": IGNORED, "token_stats": True, "config": config}
    inputs = (problem.hidden, problem.head, problem.labels)
    exact = expected(problem)
    whole = score_rows(*inputs, **common).token_stats_KT
    sliced = frozen_head(*inputs, slice_columns=64, **common).token_stats_KT
    for got in (whole, sliced):
        assert (got[:, problem.labels == IGNORED] == 0).all()
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=atol, equal_nan=True)


def test_the_kernels_compute_every_statistic():
    assert set(TOKEN_STATS) == set(STATS)


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
def test_vocabularies(V, config):
    compare(Problem.make(19, V), config)


@pytest.mark.parametrize("columns", [None, 128], ids=["", "mass"])
def test_slices_of_the_vocabulary(columns, monkeypatch):
    """What partials may take decides in how many steps they are merged, and no more."""
    problem = Problem.make(19, 700, bias=True, softcap=5.0)
    options = {"token_stats": True, "mass_columns": columns}
    whole = problem.stats(SMALL, **options)
    monkeypatch.setattr(tile_logps, "PARTIAL_BYTES", 1)
    compare(problem)
    sliced = problem.stats(SMALL, **options)
    for name in ("logps_T", "lse_T", "token_stats_KT", "mass_TC"):
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 3, 130, None])
def test_rows_that_are_not_finite(value, column):
    """One logit of a row, or all of them; the label is the first, the last or one of the middle."""
    for label in (0, 3, 199):
        problem = Problem.make(3, 200, ignored=False)
        problem.hidden[1, 0] = torch.nan if column is None else problem.hidden[1, 0]
        bias = torch.zeros(200)
        if column is not None:
            bias[column] = value
        problem.set_bias(bias)
        problem.labels[:] = label
        compare(problem)
        hidden = problem.hidden.clone().requires_grad_()
        found = linear_logps(hidden, problem.weight, problem.labels, bias=bias, stats=STATS, impl="torch").stats
        exact = dict(zip(TOKEN_STATS, expected(problem), strict=True))
        for name, got in found.items():
            torch.testing.assert_close(got.double(), exact[name], rtol=1e-5, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options(dtype):
    compare(Problem.make(11, 150, dtype=dtype, bias=True, softcap=3.0, logit_scale=0.5, temperature=0.7))


def test_hits():
    """The label is the top of every row but one."""
    problem = Problem.make(9, 200, ignored=False)
    problem.labels = (problem.hidden @ problem.weight.T).argmax(dim=1)
    problem.labels[4] = (problem.labels[4] + 1) % 200
    compare(problem)


def test_of_equal_logits_the_first_is_the_top():
    """Ties within a tile, across tiles and across slices."""
    problem = Problem(torch.ones(4, 16), Head(torch.ones(200, 16)), torch.tensor([0, 1, 70, 199]))
    compare(problem)
    problem.weight[:66] = 0.5
    problem.labels = torch.tensor([0, 66, 67, 199])
    compare(problem)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_far_from_zero(shift):
    problem = Problem.make(5, 150)
    problem.set_bias(torch.full((150,), shift))
    compare(problem, atol=5e-3)


def test_confident_rows():
    problem = Problem.make(7, 150, scale=40.0, ignored=False)
    compare(problem, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_through_the_op(frozen):
    problem = Problem.make(11, 150)
    hidden = problem.hidden.clone().requires_grad_(frozen)
    names = ("is_top1", "entropy")
    out = linear_logps(hidden, problem.weight, problem.labels, stats=names, impl="triton")
    exact = dict(zip(TOKEN_STATS, expected(problem), strict=True))
    assert tuple(out.stats) == names
    assert torch.equal(out.stats["is_top1"], exact["is_top1"].bool())
    torch.testing.assert_close(out.stats["entropy"].double(), exact["entropy"], rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [10**6, 14])
def test_through_the_paired_op(chunk, softcap, monkeypatch):
    """Chunks of whole pairs and of a pair that is split; the loss is that without statistics to rounding."""
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: chunk)
    case = Case(RESPONSE_LENGTHS["a long pair between short ones"], D=16, dtype=torch.float32)
    leaves = case.leaves()
    options = {"bias": leaves[2], "softcap": softcap, "impl": "triton"}
    arguments = (*leaves[:2], case.labels, case.cu, case.ref)
    plain, out = (linear_dpo_loss(*arguments, stats=stats, **options) for stats in (None, TOKEN_STATS))
    found, wanted = (torch.autograd.grad(o.loss, leaves) for o in (out, plain))
    torch.testing.assert_close((out.logps, *found), (plain.logps, *wanted), rtol=1e-5, atol=1e-6)
    wide = [t.double() for t in (case.hidden, case.weight)]
    for name, want in definition(*wide, case.labels, bias=case.bias.double(), softcap=softcap).items():
        torch.testing.assert_close(out.stats[name].double(), want.double(), rtol=1e-5, atol=1e-5)
