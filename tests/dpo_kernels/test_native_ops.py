"""The ``native`` implementations: no further from float64 than twice what ``torch`` is, on every instruction set.

Whatever an implementation can be asked for is here, in small slices of the vocabulary and small chunks of pairs.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.library import opcheck

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import linear_dpo_loss, linear_logps, native
from dpo_kernels.linear_dpo import pair_chunks
from dpo_kernels.linear_dpo.ops import linear_dpo_op
from dpo_kernels.linear_logps import slices
from dpo_kernels.linear_logps.ops import linear_logps_backward_op, linear_logps_op
from dpo_kernels.linear_logps.stats import STATS
from tests.dpo_kernels.linear_dpo_setup import LOSSES, Case

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = {
    "bare": {},
    "scaled": {"logit_scale": -0.6, "temperature": 1.7},
    "softcap": {"softcap": 2.5, "logit_scale": 0.8, "temperature": 0.7},
}
T, D, V = 61, 13, 701


@pytest.fixture(params=native.isas() if native.library() else ["none"], autouse=True)
def isa(request, monkeypatch):
    """In small slices and chunks, so that there are several of each."""
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 129)
    monkeypatch.setattr(pair_chunks, "BUFFER_BYTES", 12 * 23 * 4)
    with native.use_isa(request.param):
        yield request.param


def compare(function, leaves, trained=None) -> None:
    """``function(*leaves, impl=...)`` gives results, the first of which has gradients of the ``trained`` leaves."""
    trained = [True] * len(leaves) if trained is None else trained

    def run(impl: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        fresh = [
            t.detach().clone().to(dtype or t.dtype).requires_grad_(n) for t, n in zip(leaves, trained, strict=True)
        ]
        out = function(*fresh, impl=impl)
        upstream = torch.linspace(-1, 1.5, out[0].numel()).reshape(out[0].shape)
        wanted = [t for t in fresh if t.requires_grad]
        gradients = torch.autograd.grad(out[0], wanted, upstream.to(out[0].dtype)) if wanted else ()
        return [t.detach() for t in (*out, *gradients)]

    results = zip(run("native"), run("torch"), run("reference", torch.float64), strict=True)
    for place, (found, theirs, exact) in enumerate(results):
        assert found.dtype == theirs.dtype
        assert found.isfinite().all()
        if not found.numel():
            continue
        unit = 4 * torch.finfo(found.dtype).eps * exact.double().abs().max()
        error, naive = ((t.double() - exact.double()).abs().max() for t in (found, theirs))
        assert error <= 2 * naive + unit, place


def logps_leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(T, D).to(dtype), (torch.randn(V, D) / 2).to(dtype), torch.randn(V).to(dtype)]


def logps_labels() -> torch.Tensor:
    labels = torch.randint(0, V, (T,))
    labels[::7] = -100
    return labels


def logps(hidden, weight, bias=None, *, labels, stats=None, **options):
    found = linear_logps(hidden, weight, labels, bias=bias, stats=stats, **options)
    if stats is None:
        return [found]
    return [found.logps, *(values.to(found.logps.dtype) for values in found.stats.values())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("bias", [True, False])
def test_log_probs(dtype: torch.dtype, options: dict, bias: bool) -> None:
    leaves = logps_leaves(dtype)[: 2 + bias]
    call = functools.partial(logps, labels=logps_labels(), stats=STATS, **options)
    compare(call, leaves)
    # With a frozen head, whose gradient is formed in forward; without any gradient; with some alone.
    for trained in ((True, False, False), (False, False, False), (False, True, False)):
        compare(call, leaves, trained[: len(leaves)])


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filtered(options: dict, dtype: torch.dtype) -> None:
    """With no budget the exact gradient; with one, the tiles that torch keeps, and their gradient."""
    leaves, labels = logps_leaves(dtype), logps_labels()
    compare(functools.partial(logps, labels=labels, filter_mass=0.0, **options), leaves)
    found, theirs = (
        logps(*leaves, labels=labels, filter_mass=0.2, stats=("kept_tiles", "dropped_mass"), impl=impl, **options)
        for impl in ("native", "torch")
    )
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lengths", RESPONSE_LENGTHS.values(), ids=RESPONSE_LENGTHS)
@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
def test_every_loss(loss_type, lengths) -> None:
    """Chunks of whole pairs, pairs that are held whole, pairs that are split."""
    case = Case(lengths, dtype=torch.float32)

    def call(hidden, weight, bias, *, impl):
        options = {
            "bias": bias,
            "loss_type": loss_type,
            "reduction": "sum",
            "pair_weights": case.pair_weights.to(ref(hidden)),
        }
        out = linear_dpo_loss(hidden, weight, case.labels, case.cu, case.ref.to(ref(hidden)), impl=impl, **options)
        return list(out)

    compare(call, [case.hidden, case.weight, case.bias])


def ref(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss(dtype: torch.dtype, options: dict, reduction: str) -> None:
    case = Case((9, 4, 3, 30, 17, 2, 0, 5), dtype=dtype)

    def call(hidden, weight, bias, *, impl):
        given = {"bias": bias, "reduction": reduction, "stats": STATS, **options}
        out = linear_dpo_loss(hidden, weight, case.labels, case.cu, case.ref.to(ref(hidden)), impl=impl, **given)
        return [*out[:-1], *(values.to(out.logps.dtype) for values in out.stats.values())]

    leaves = [case.hidden, case.weight, case.bias]
    compare(call, leaves)
    for trained in ((True, False, False), (False, True, False), (False, False, True)):
        compare(call, leaves, trained)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_main_gradient(dtype: torch.dtype) -> None:
    leaves, labels = logps_leaves(dtype), logps_labels()
    cu, zeros = torch.tensor([0, 20, 31, 31, T]), torch.zeros(4)
    for filter_mass in (None, 0.0):
        gradients = []
        for impl in ("native", "torch"):
            hidden, weight, bias = (t.clone().requires_grad_() for t in leaves)
            main = torch.ones(V, D)
            options = {"bias": bias, "weight_grad": main, "impl": impl}
            linear_logps(hidden, weight, labels, filter_mass=filter_mass, **options).sum().backward()
            linear_dpo_loss(hidden, weight, labels, cu, zeros, **options).loss.backward()
            assert weight.grad is None
            gradients.append(main)
        torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-4 if dtype == torch.float32 else 1e-3)


def test_runs_and_threads_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, labels = logps_leaves(torch.float32), logps_labels()
    cu, zeros = torch.tensor([0, 20, 31, 31, T]), torch.zeros(4)
    results = []
    for threads in (1, 1, 2, 5):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        hidden, weight, bias = (t.clone().requires_grad_() for t in leaves)
        options = {"bias": bias, "softcap": 3.0, "impl": "native"}
        out = linear_dpo_loss(hidden, weight, labels, cu, zeros, **options)
        logps_T = linear_logps(hidden, weight, labels, **options)
        (out.loss + logps_T.sum()).backward()
        results.append([out.logps, logps_T.detach(), hidden.grad, weight.grad, bias.grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinities_are_torchs() -> None:
    """A row with nan or +inf is nan all over, and so is what sums over rows; others stay as they are."""
    leaves, labels = logps_leaves(torch.float32), torch.randint(0, V, (T,))
    leaves[0][3, 2], leaves[0][4, 1] = torch.nan, torch.inf
    leaves[2][:300] = -torch.inf
    labels[10:20] = torch.arange(10)
    cu, zeros = torch.tensor([0, 20, 31, 31, T]), torch.zeros(4)
    for call in ("logps", "loss"):
        results = []
        for impl in ("native", "torch"):
            hidden, weight, bias = (t.clone().requires_grad_() for t in leaves)
            if call == "logps":
                out = linear_logps(hidden, weight, labels, bias=bias, impl=impl)
            else:
                out = linear_dpo_loss(hidden, weight, labels, cu, zeros, bias=bias, impl=impl, reduction="sum").loss
            gradients = torch.autograd.grad(out.sum(), (hidden, weight, bias))
            results.append([out.detach(), *gradients])
        torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    hidden, weight, bias = (t[:40].requires_grad_() for t in logps_leaves(torch.bfloat16))
    labels = torch.randint(0, 40, (40,))
    options = (3.0, 1.5, 0.8, -100, "native")
    opcheck(linear_logps_op, (hidden, weight, labels, bias, *options, False, "is_top1,entropy"))
    opcheck(linear_logps_op, (hidden, weight.detach(), labels, None, *options, True, ""))
    logps, lse, *_ = linear_logps_op(hidden, weight, labels, bias, *options, False, "")
    frozen = [t.detach() for t in (hidden, weight, labels, lse, bias)]
    opcheck(linear_logps_backward_op, (torch.randn_like(logps), *frozen, *options, True, True, True))
    cu, ref = torch.tensor([0, 11, 20, 20, 40]), torch.randn(4)
    given = (
        hidden,
        weight,
        labels,
        cu,
        ref,
        None,
        None,
        torch.rand(2),
        bias,
        "sigmoid",
        [1.0],
        [0.1, 0.0, 0.05, 0.5, 1.0],
    )
    opcheck(linear_dpo_op, (*given, True, *options, True, True, True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend: str, isa: str) -> None:
    if isa != native.isas()[-1]:
        pytest.skip("the graph does not depend on the instruction set")
    leaves, labels = [t.requires_grad_() for t in logps_leaves(torch.float32)], logps_labels()
    cu, zeros = torch.tensor([0, 20, 31, 31, T]), torch.zeros(4)

    def function(hidden, weight, bias):
        out = linear_dpo_loss(hidden * 2, weight, labels, cu, zeros, bias=bias, impl="native")
        return out.loss + linear_logps(hidden * 2, weight, labels, bias=bias, impl="native").mean()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)(*leaves)
    expected = function(*leaves)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves) for out in (compiled, expected)))


@pytest.mark.parametrize("factor", [1.0, -0.5])
@pytest.mark.parametrize("keep_graph", [False, True])
def test_upstream_factor(factor: float, keep_graph: bool) -> None:
    """1 is not multiplied by; anything else is, and a graph that is kept gives the same again."""
    case = Case((9, 4, 3, 6), dtype=torch.float32)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl="native")
    found = torch.autograd.grad(out.loss * factor, leaves, retain_graph=keep_graph)
    if keep_graph:
        again = torch.autograd.grad(out.loss * factor, leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl="torch")
    torch.testing.assert_close(found, torch.autograd.grad(out.loss * factor, leaves))
