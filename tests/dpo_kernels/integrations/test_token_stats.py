"""Token statistics against their definitions on the whole logits matrix, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dpo_kernels import chunks
from dpo_kernels.integrations import token_stats as module
from dpo_kernels.integrations.token_stats import STATS, token_stats

N, D, V = 13, 24, 333


def definition(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, temperature=1.0):
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    return {
        "entropy": torch.special.entr(p).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, dim=-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == labels,
    }


def head(dtype=torch.float32, scale=1.0):
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype) * scale
    labels = torch.where(torch.arange(N) % 2 == 0, (hidden.float() @ weight.float().T).argmax(-1), torch.arange(N))
    return hidden, weight, labels


def check(hidden, weight, labels, rtol=1e-5, atol=1e-5, **options):
    found = token_stats(hidden, weight, labels, STATS, **options)
    for name, expected in definition(hidden, weight, labels, **options).items():
        assert_close(
            found[name], expected.to(found[name].dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("buffer_rows", [10**6, 70, 64])
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
def test_equal_to_definition(monkeypatch, buffer_rows, options):
    monkeypatch.setattr(module, "BUFFER_BYTES", buffer_rows * N * 4)
    monkeypatch.setattr(chunks, "CACHE_BYTES", 5 * V * 4)
    check(*head(), bias=torch.randn(V), **options)


def test_half_precision_inputs():
    check(*head(torch.bfloat16))


def test_float64():
    check(*head(torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_flat_and_saturated(monkeypatch, scale):
    monkeypatch.setattr(module, "BUFFER_BYTES", 64 * N * 4)
    check(*head(scale=scale), rtol=1e-4, atol=1e-4)


def test_tokens_masked_by_bias(monkeypatch):
    monkeypatch.setattr(module, "BUFFER_BYTES", 64 * N * 4)
    hidden, weight, labels = head()
    bias = torch.zeros(V)
    bias[:200] = -torch.inf
    labels = (hidden @ weight.T + bias).argmax(-1)
    check(hidden, weight, labels, bias=bias)


def test_first_of_equal_logits_is_top():
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [3.0], [3.0]])
    found = token_stats(hidden, weight, torch.tensor([1, 2]), {"is_top1"})
    assert found["is_top1"].tolist() == [True, False]


def test_only_what_is_asked_for():
    hidden, weight, labels = head()
    everything = token_stats(hidden, weight, labels, STATS)
    for name in STATS:
        found = token_stats(hidden.requires_grad_(), weight, labels, (name,))
        assert list(found) == [name]
        assert not found[name].requires_grad
        assert_close(found[name], everything[name], rtol=0, atol=0)
    assert token_stats(hidden, weight, labels, ()) == {}


def test_no_rows():
    found = token_stats(torch.zeros(0, D), torch.randn(V, D), torch.zeros(0, dtype=torch.int64), STATS)
    assert {name: tuple(value.shape) for name, value in found.items()} == dict.fromkeys(STATS, (0,))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"must be among entropy.*got logits"):
        token_stats(*head(), ("logits",))
