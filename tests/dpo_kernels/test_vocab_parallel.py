"""A head spread over two and three processes against the head in one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from dpo_kernels import linear_logps, linear_logps_vocab_parallel
from dpo_kernels.linear_logps.vocab_parallel import vocab_parallel_op
from tests.dpo_kernels.test_linear_logps import run, torch_logps
from tests.dpo_kernels.vocab_parallel_setup import BOUNDS, CASES, D, T, V, make_case, worker


@pytest.fixture(scope="module", params=BOUNDS, ids="{} processes".format)
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each process found."""
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    torch.multiprocessing.spawn(worker, args=(size, str(folder)), nprocs=size)
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


def whole(ranks: list[dict], case: str) -> list[torch.Tensor]:
    """[logps, dX, dW, db], after checking that every process has the same bits of the first two."""
    shards = [rank[case] for rank in ranks]
    for shard in shards[1:]:
        assert torch.equal(shard[0], shards[0][0])
        assert torch.equal(shard[1], shards[0][1])
    return [*shards[0][:2], *(torch.cat(parts) for parts in list(zip(*shards, strict=True))[2:])]


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_one_process(ranks, case: str) -> None:
    """Float64 to 1e-12; below, at most twice the error of torch in that dtype and one process, plus 4 roundings."""
    dtype, with_bias, options = CASES[case]
    hidden, weight, labels, bias, upstream = make_case(dtype, with_bias, **options)
    raised = [None if t is None else t.double() for t in (hidden, weight, bias)]
    exact = run(raised[0], raised[1], labels, raised[2], upstream, function=torch_logps, **options)
    naive = run(hidden, weight, labels, bias, upstream, function=torch_logps, **options)
    for name, truth, theirs, found in zip(("logps", "dX", "dW", "db"), exact, naive, whole(ranks, case), strict=False):
        assert found.dtype == theirs.dtype
        if dtype == torch.float64:
            assert_close(found, truth, rtol=1e-12, atol=1e-12)
            continue
        unit = 4 * torch.finfo(found.dtype).eps * truth.abs().max()
        bound = 2 * (theirs.double() - truth).abs().max() + unit
        assert (found.double() - truth).abs().max() <= bound, name


def test_frozen_slice(ranks) -> None:
    logps, dX, *_ = whole(ranks, "plain float64")
    for rank in ranks:
        assert_close(rank["frozen"][:2], [logps, dX])
        assert rank["frozen"][2] is None


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_registered(alone) -> None:
    """Checked as an operator, and whole in one graph."""
    hidden, weight, labels, bias, upstream = make_case(torch.float32, True)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    opcheck(vocab_parallel_op, (hidden, weight, labels, bias, 3.0, 1.5, 0.8, -100, "torch", 0, alone.group_name))

    def call(hidden, weight, bias):
        return linear_logps_vocab_parallel(hidden, weight, labels, bias_shard=bias, group=alone, vocab_start=0)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    expected = linear_logps(hidden, weight, labels, bias=bias)
    assert_close(compiled, expected)
    found, wanted = (torch.autograd.grad(t, leaves, upstream.float(), retain_graph=True) for t in (compiled, expected))
    assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="linear_logps_vocab_parallel has no second derivative"):
        torch.autograd.grad(call(*leaves).sum(), leaves, create_graph=True)


def test_no_row_that_counts(ranks) -> None:
    for case, rows in (("no rows", 0), ("all ignored", T)):
        logps, dX, dW = whole(ranks, case)
        assert [t.shape for t in (logps, dX, dW)] == [(rows,), (rows, D), (V, D)]
        assert all(t.eq(0).all() for t in (logps, dX, dW))


def test_a_slice_may_be_masked_whole(ranks) -> None:
    hidden, weight, labels, _, _ = make_case(torch.float64, False)
    first = BOUNDS[len(ranks)][1]
    expected = torch.log_softmax(hidden @ weight[first:].T, dim=-1)
    outside = labels < first
    expected = expected.gather(1, (labels - first).masked_fill(outside, 0).unsqueeze(1)).squeeze(1)
    expected = expected.masked_fill(outside, -torch.inf).masked_fill(labels == -100, 0)
    assert_close(ranks[0]["masked slice"][0], expected)


def test_a_label_belongs_to_one_process(ranks) -> None:
    for rank in ranks:
        message = "labels must be a class that exactly one process holds, or -100 (ignored); got"
        assert rank["outside"] == f"{message} 101 at index 0, held by 0 processes"
        assert rank["shared"] == f"{message} 0 at index 0, held by {len(ranks)} processes"


def test_refused_before_any_communication() -> None:
    tensors = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)
    group = SimpleNamespace(group_name="none")
    with pytest.raises(RuntimeError, match="no impl='reference': that one needs the whole vocabulary"):
        linear_logps_vocab_parallel(*tensors, group=group, vocab_start=0, impl="reference")
    with pytest.raises(ValueError, match="vocab_start must be at least 0; got -1"):
        linear_logps_vocab_parallel(*tensors, group=group, vocab_start=-1)
    with pytest.raises(ValueError, match=r"bias must have shape \[5\]"):
        linear_logps_vocab_parallel(*tensors, group=group, vocab_start=0, bias_shard=torch.zeros(4))
