"""``linear_logps`` and ``linear_dpo_loss`` with impl="triton", through registration, dispatch and autograd."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import describe, linear_dpo_loss, linear_logps
from tests.dpo_kernels.kernels.interpreted.twin import IGNORED, assert_as_good, rounding

triton_tiles = importlib.import_module("dpo_kernels.linear_logps.triton_tiles")
triton_pairs = importlib.import_module("dpo_kernels.linear_dpo.triton_pairs")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ALL_OPTIONS = {"softcap": 3.0, "logit_scale": 0.5, "temperature": 0.7}


class Case:
    """Inputs of one call, and what an implementation makes of them."""

    def __init__(self, lengths, V: int = 150, D: int = 24, dtype: torch.dtype = torch.float32):
        N, S = sum(lengths), len(lengths)
        self.tensors = [(torch.randn(*shape) / 2).to(dtype) for shape in ((N, D), (V, D), (V,))]
        self.labels = torch.randint(0, V, (N,))
        self.labels[torch.rand(N) < 0.15] = IGNORED
        self.upstream = torch.randn(N)
        self.cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        self.ref_S = -5 * torch.tensor(lengths, dtype=torch.float32) + torch.randn(S)
        self.pair_weights = torch.rand(S // 2) + 0.5

    def leaves(self, dtype: torch.dtype | None, trained) -> list[torch.Tensor]:
        copies = [t.detach().clone().to(dtype or t.dtype) for t in self.tensors]
        return [t.requires_grad_(need) for t, need in zip(copies, trained, strict=True)]

    def log_probs(self, impl: str, dtype: torch.dtype | None = None, trained=(True, True, True), **options):
        hidden, weight, bias = leaves = self.leaves(dtype, trained)
        logps = linear_logps(hidden, weight, self.labels, bias=bias, impl=impl, **options)
        needed = [t for t in leaves if t.requires_grad]
        gradients = torch.autograd.grad(logps, needed, self.upstream.to(logps.dtype)) if needed else ()
        return [logps.detach(), *gradients]

    def loss(self, impl: str, dtype: torch.dtype | None = None, trained=(True, True, True), **options):
        hidden, weight, bias = leaves = self.leaves(dtype, trained)
        out = linear_dpo_loss(
            hidden,
            weight,
            self.labels,
            self.cu,
            self.ref_S,
            bias=bias,
            pair_weights=self.pair_weights,
            impl=impl,
            **options,
        )
        needed = [t for t in leaves if t.requires_grad]
        return [out.loss.detach(), out.pair_losses, out.logps, *torch.autograd.grad(out.loss.sum(), needed)]


def compare(case: Case, method: str, **arguments):
    run = getattr(case, method)
    exact = run("reference", torch.float64, **arguments)
    got, rival = run("triton", **arguments), run("torch", **arguments)
    dtype = case.tensors[0].dtype
    assert len(got) == len(exact)
    outputs = 1 if method == "log_probs" else 3
    for value, other, expected in zip(got[:outputs], rival[:outputs], exact[:outputs], strict=True):
        assert value.dtype == torch.float32
        assert_as_good(value, other, expected, 2e-6)
    for value, other, expected in zip(got[outputs:], rival[outputs:], exact[outputs:], strict=True):
        assert value.dtype == dtype
        # The rival forms gradients in fp32 on the CPU, these are rounded before their products, like autograd's.
        assert_as_good(value, other, expected, 4 * rounding(dtype) + 2e-6)
    return got


@pytest.fixture
def narrow_slices(monkeypatch):
    monkeypatch.setattr(triton_tiles, "SLICE_BYTES", 1)
    monkeypatch.setattr(triton_tiles, "MIN_SLICE", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["", "all"])
def test_log_probs(dtype, options, narrow_slices):
    compare(Case((19,), dtype=dtype), "log_probs", **options)


@pytest.mark.parametrize("frozen", [False, True])
def test_peaked_logits_of_a_hundred(frozen, narrow_slices):
    """One token takes nearly all mass: a log-sum-exp rounded to fp32 would move each probability by 4e-6 of itself."""
    hidden, weight, labels = torch.randn(40, 1) * 30, torch.randn(513, 1), torch.randint(0, 513, (40,))

    def gradients(function, dtype):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
        return torch.autograd.grad(function(*leaves).sum(), leaves[: 2 - frozen])

    def naive(hidden, weight):
        return torch.log_softmax(hidden @ weight.T, -1).gather(1, labels[:, None])

    exact, rival = gradients(naive, torch.float64), gradients(naive, torch.float32)
    got = gradients(lambda hidden, weight: linear_logps(hidden, weight, labels, impl="triton"), torch.float32)
    for found, other, truth in zip(got, rival, exact, strict=True):
        unit = 4 * torch.finfo(torch.float32).eps * truth.norm()
        assert (found - truth).norm() <= 2 * (other - truth).norm() + unit


@pytest.mark.parametrize("trained", [t for t in itertools.product([True, False], repeat=3) if any(t)])
def test_frozen_inputs(trained, narrow_slices):
    compare(Case((9,)), "log_probs", trained=trained)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_head(dtype, narrow_slices):
    compare(Case((19,), dtype=dtype), "log_probs", trained=(True, False, False), **ALL_OPTIONS)


@pytest.mark.parametrize("lengths", [(0,), (1,), (2,), (129,)])
def test_row_counts(lengths):
    compare(Case(lengths, V=70), "log_probs")


@pytest.mark.parametrize(("V", "trained"), [(32001, (True, True, True)), (50257, (False, False, False))])
def test_real_vocabularies(V, trained):
    compare(Case((2,), V=V, D=16), "log_probs", trained=trained)


def test_no_gradient():
    compare(Case((9,)), "log_probs", trained=(False, False, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["", "all"])
def test_loss(dtype, options):
    compare(Case(RESPONSE_LENGTHS["uneven"], dtype=dtype), "loss", **options)


@pytest.mark.parametrize("lengths", RESPONSE_LENGTHS.values(), ids=RESPONSE_LENGTHS)
def test_response_lengths(lengths):
    compare(Case(lengths), "loss")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", ["sigmoid", ["ipo", "orpo"], "aot"])
def test_reductions_and_losses(reduction, loss_type):
    compare(Case(RESPONSE_LENGTHS["uneven"]), "loss", reduction=reduction, loss_type=loss_type, beta=0.3)


@pytest.mark.parametrize(
    "trained", [(False, True, False), (True, True, False), (False, False, True), (True, False, False)]
)
@pytest.mark.parametrize("rows", [1000, 3])
def test_loss_with_frozen_inputs(trained, rows, monkeypatch):
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: rows)
    compare(Case((4, 4, 3, 2), D=1), "loss", trained=trained)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), *itertools.product([6, 14, 30], DTYPES)])
def test_chunks_and_pairs_longer_than_a_chunk(rows, dtype, monkeypatch):
    """D = 2 makes splitting cheap, so that pairs of 16 rows and more are split where chunks are shorter."""
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: rows)
    compare(Case(RESPONSE_LENGTHS["a long pair between short ones"], D=2, dtype=dtype), "loss")


@pytest.mark.parametrize(("rows", "chunks"), [(1000, 1), (14, 4), (6, 8)])
@pytest.mark.parametrize("workspace", [0, 2**30])
def test_how_often_a_bfloat16_weight_gradient_is_rounded(rows, chunks, workspace, monkeypatch):
    """Once where it is summed in float32; once a chunk, and never more than four times, where that takes no memory."""
    seen = []
    want = triton_pairs._Call.want_gradients
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: rows)
    monkeypatch.setattr(triton_pairs, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(triton_pairs._Call, "want_gradients", lambda self, *a: seen.append(a[-1]) or want(self, *a))
    lengths = (4, 2, 3, 3, 5, 1, 2, 4, 3, 3, 4, 2, 1, 5, 3, 3)
    assert len(triton_pairs.plan_chunks([0, *itertools.accumulate(lengths)], rows, 1000)) == chunks
    compare(Case(lengths, D=2, dtype=torch.bfloat16), "loss")
    in_place = chunks == 1 or (chunks <= triton_pairs.IN_PLACE_CHUNKS and not workspace)
    assert set(seen) == {torch.bfloat16 if in_place else torch.float32}


@pytest.mark.parametrize("lengths", [(40, 30), (40, 0, 21, 30)])
def test_a_split_pair_is_summed_in_float32(lengths, monkeypatch):
    """Also when it is the only one: the shares of its two responses nearly cancel, their roundings do not."""
    seen = []
    want = triton_pairs._Call.want_gradients
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: 10)
    monkeypatch.setattr(triton_pairs._Call, "want_gradients", lambda self, *a: seen.append(a[-1]) or want(self, *a))
    compare(Case(lengths, D=2, dtype=torch.bfloat16), "loss")
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [14, 10_000])
@pytest.mark.parametrize("largest", [2.0, 1e4])
def test_weights_of_tokens_and_margins(largest, rows, dtype, monkeypatch):
    """Whole pairs and split ones; weights beyond what float16 would hold times a slope."""
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: rows)
    case = Case((5, 9, 40, 61, 0, 3, 1, 1), D=2 if rows == 14 else 24, dtype=dtype)
    weights, margins = largest * torch.rand(sum((5, 9, 40, 61, 0, 3, 1, 1))), torch.rand(4)
    case.ref_S = case.ref_S * largest
    compare(case, "loss", token_weights=weights, margins=margins, beta=0.1 / largest)


def test_divergences():
    compare(Case((5, 9, 1, 7)), "loss", f_divergence_type="js_divergence", loss_type=("sigmoid", "dpo_norm"))


def test_only_long_pairs(monkeypatch):
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: 10)
    compare(Case((40, 0, 21, 30, 0, 25), D=2), "loss")


def test_two_runs_are_bitwise_equal(monkeypatch):
    monkeypatch.setattr(triton_pairs, "chunk_rows", lambda *a, **k: 14)
    case = Case(RESPONSE_LENGTHS["a long pair between short ones"], D=2, dtype=torch.bfloat16)
    for method in (case.loss, case.log_probs):
        assert all(torch.equal(a, b) for a, b in zip(method("triton"), method("triton"), strict=True))


def test_small_float16_gradients_survive_a_large_batch():
    """Without its own scale a gradient of 1e-6 would be a float16 subnormal, whatever a loss scale does later."""
    case = Case((3, 4), dtype=torch.float16)
    case.pair_weights *= 1e-5
    hidden, weight, bias = leaves = case.leaves(None, (True, True, True))
    out = linear_dpo_loss(
        hidden, weight, case.labels, case.cu, case.ref_S, bias=bias, pair_weights=case.pair_weights, impl="triton"
    )
    got = torch.autograd.grad(out.loss * 1e5, leaves)
    exact = case.loss("reference", torch.float64)[3:]
    for value, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double() * 1e-5, expected, rtol=0.01, atol=2e-3 * expected.abs().max().item())


def test_strided_inputs():
    case = Case((5, 6))
    wide = [torch.cat([t, t], dim=-1) for t in case.tensors[:2]]
    expected = case.loss("triton")
    case.tensors[:2] = [t[:, :24] for t in wide]
    hidden, weight = (t.detach()[:, :24].requires_grad_() for t in wide)
    out = linear_dpo_loss(
        hidden,
        weight,
        case.labels,
        case.cu,
        case.ref_S,
        bias=case.tensors[2],
        pair_weights=case.pair_weights,
        impl="triton",
    )
    assert torch.equal(out.loss.detach(), expected[0])


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        Case((3,)).log_probs("triton", torch.float64)


def test_auto_does_not_pick_the_interpreter():
    assert describe("cpu").linear_logps.impl in ("native", "torch")
