"""Statistics of tokens against their definitions on the whole logits matrix, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from dpo_kernels import chunks, describe, dispatch, linear_logps
from dpo_kernels.chunks import product_
from dpo_kernels.linear_logps import slices, torch_chunks
from dpo_kernels.linear_logps.stats import STATS
from tests.dpo_kernels.native_setup import NATIVE

N, D, V = 13, 24, 333
IMPLS = ("torch", "reference")


def definition(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, temperature=1.0):
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = torch.log_softmax(z, dim=-1)
    found = {
        "entropy": torch.special.entr(log_p.exp()).sum(-1),
        "is_top1": z.argmax(-1) == labels,
        "mean_logits": z.mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, dim=-1),
    }
    return {name: values.masked_fill(labels == -100, 0) for name, values in found.items()}


def head(dtype=torch.float32, scale=1.0):
    """Every second label is the top one, one row is ignored."""
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype) * scale
    labels = torch.where(torch.arange(N) % 2 == 0, (hidden.float() @ weight.float().T).argmax(-1), torch.arange(N))
    labels[5] = -100
    return hidden, weight, labels


def check(hidden, weight, labels, rtol=1e-5, atol=1e-5, **options):
    expected = definition(hidden, weight, labels, **options)
    for impl in IMPLS if hidden.dtype == torch.float64 else IMPLS + NATIVE:
        logps, found = linear_logps(hidden, weight, labels, stats=STATS, impl=impl, **options)
        assert_close(logps, linear_logps(hidden, weight, labels, impl=impl, **options), rtol=0, atol=0)
        assert list(found) == list(STATS)
        for name, values in expected.items():
            assert found[name].dtype == (torch.bool if name == "is_top1" else logps.dtype)
            want = values.to(found[name].dtype)
            assert_close(found[name], want, rtol=rtol, atol=atol, msg=lambda m, n=name, i=impl: f"{i} {n}: {m}")


@pytest.mark.parametrize("width", [10**6, 70, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"logit_scale": 0.3},
        {"temperature": 0.7},
        {"softcap": 3.0, "logit_scale": 2.0, "temperature": 1.5},
    ],
    ids=str,
)
def test_equal_to_definition(monkeypatch, width, options):
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: width)
    monkeypatch.setattr(chunks, "CACHE_BYTES", 5 * V * 4)
    check(*head(), bias=torch.randn(V), **options)


def test_half_precision_inputs():
    check(*head(torch.bfloat16))


def test_float64():
    check(*head(torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_flat_and_saturated(monkeypatch, scale):
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 64)
    check(*head(scale=scale), rtol=1e-4, atol=1e-4)


def test_tokens_masked_by_bias(monkeypatch):
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 64)
    hidden, weight, labels = head()
    bias = torch.zeros(V)
    bias[:200] = -torch.inf
    labels = (hidden @ weight.T + bias).argmax(-1)
    check(hidden, weight, labels, bias=bias)


@pytest.mark.parametrize("impl", IMPLS)
def test_first_of_equal_logits_is_top(impl):
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [3.0], [3.0]])
    found = linear_logps(hidden, weight, torch.tensor([1, 2]), stats=["is_top1"], impl=impl).stats
    assert found["is_top1"].tolist() == [True, False]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_stay_and_statistics_have_none(impl, frozen):
    """Only what is asked for, with the same bits as all at once; log-probs and gradients as without statistics."""
    hidden, weight, labels = head()
    leaves = [hidden.requires_grad_()] if frozen else [hidden.requires_grad_(), weight.requires_grad_()]
    plain = linear_logps(hidden, weight, labels, softcap=3.0, impl=impl)
    upstream = torch.randn(N)
    expected = torch.autograd.grad(plain, leaves, upstream)
    everything = linear_logps(hidden, weight, labels, softcap=3.0, impl=impl, stats=STATS).stats
    for names in ((), *((name,) for name in STATS), STATS[::-1]):
        logps, found = linear_logps(hidden, weight, labels, softcap=3.0, impl=impl, stats=names)
        assert list(found) == list(names)
        for name, values in found.items():
            assert not values.requires_grad
            assert torch.equal(values, everything[name])
        assert torch.equal(logps, plain)
        assert_close(torch.autograd.grad(logps, leaves, upstream), expected, rtol=0, atol=0)


def test_no_further_product(monkeypatch):
    calls = []

    def counted(*given, **options):
        calls.append(1)
        product_(*given, **options)

    monkeypatch.setattr(
        torch_chunks, "forward", partial(slices.forward, torch_chunks.PASSES._replace(product_=counted))
    )
    linear_logps(*head(), impl="torch")
    plain = len(calls)
    linear_logps(*head(), stats=STATS, impl="torch")
    assert len(calls) == 2 * plain > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_no_row_that_counts(impl):
    for rows in (0, 3):
        labels = torch.full((rows,), -100)
        found = linear_logps(torch.randn(rows, D), torch.randn(V, D), labels, stats=STATS, impl=impl).stats
        assert {name: values.tolist() for name, values in found.items()} == {name: [0] * rows for name in STATS}


def test_under_autocast_and_without_gradients():
    hidden, weight, labels = head()
    low = hidden.bfloat16(), weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = linear_logps(hidden, weight, labels, stats=STATS).stats
    assert_close(found, linear_logps(*low, labels, stats=STATS).stats, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("logits",), "stats must be among entropy, .*; got logits"),
        ("entropy", "stats must be among entropy, .*; got e, n, t"),
        (("entropy", "entropy"), "stats must not repeat a name; got entropy, entropy"),
    ],
)
def test_names_are_checked(names, message):
    with pytest.raises(ValueError, match=message):
        linear_logps(*head(), stats=names)


def test_kernels_without_statistics_are_refused_and_not_chosen(monkeypatch):
    """Asked for by name they raise; ``auto`` takes an implementation that has the statistics and says why."""
    pytest.importorskip("triton")
    triton_tiles = dispatch._load("linear_logps", "triton")
    monkeypatch.setattr(triton_tiles, "STATS", ("is_top1",))
    monkeypatch.setattr(triton_tiles, "why_not", lambda device, dtype: None)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run .*no kernel computes the statistics entropy$"):
        linear_logps(*head(), stats=("is_top1", "entropy"), impl="triton")
    arguments = ("linear_logps", "auto", "cuda", torch.bfloat16)
    assert dispatch.choose(*arguments, ["is_top1"]).impl == "triton"
    expected = ("torch", "no Triton kernels: no kernel computes the statistics entropy")
    assert dispatch.choose(*arguments, ["entropy"]) == expected
    description = describe("cuda", torch.bfloat16)
    assert (description.linear_logps.impl, description.linear_logps_stats.impl) == ("triton", "torch")
    assert "linear_logps with stats: torch (no Triton kernels: no kernel computes" in str(description)
