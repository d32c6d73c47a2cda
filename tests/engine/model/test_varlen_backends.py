"""The CUDA backends hand the right rows, offsets and windows to their kernels, shown with plain stand-ins for these."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from engine.model.attention import Backend, packed_attention, register_backends
from engine.model.load import disable_dropout
from engine.model.policy import Policy
from engine.packing import build_batch
from tests.conformance.families import tiny_config
from tests.conformance.families import tiny_model as model_of
from tests.engine.model.families import FAMILIES, tiny_model
from tests.engine.model.test_attention import make_policy, random_groups


def varlen_reference(q_THD, k_TKD, v_TKD, cu_q, cu_k, max_q, max_k, *, scale, window_size, softcap=0.0):
    """What variable-length flash attention documents: causal, aligned at the bottom right, window (left, 0)."""
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    assert cu_q[-1] == len(q_THD)
    assert cu_k[-1] == len(k_TKD) == len(v_TKD)
    assert q_THD.shape[-1] == k_TKD.shape[-1] == v_TKD.shape[-1]
    outputs = []
    for i in range(len(cu_q) - 1):
        q, k, v = q_THD[cu_q[i] : cu_q[i + 1]], k_TKD[cu_k[i] : cu_k[i + 1]], v_TKD[cu_k[i] : cu_k[i + 1]]
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        query = torch.arange(len(q))[:, None] + len(k) - len(q)
        key = torch.arange(len(k))[None]
        allowed = key <= query
        if window_size[0] >= 0:
            allowed &= key >= query - window_size[0]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture
def stand_ins(monkeypatch):
    """Plain versions of flash-attn's and torch's variable-length functions, with their documented signatures."""

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap, deterministic):
        assert causal
        assert deterministic
        options = {"scale": softmax_scale, "window_size": window_size, "softcap": softcap}
        return varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, **options)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert window_size[1] == 0
        return varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("backend", ["flash", "varlen"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "deepseek_v3", "llama4_text", "qwen2_moe"])
def test_equal_to_sdpa(stand_ins, family, backend, share_prompts):
    batch = build_batch(random_groups(), share_prompts=share_prompts)
    model = tiny_model(family) if family in FAMILIES else model_of(tiny_config(family))
    results = []
    policy = make_policy(model)
    for name in ("sdpa", backend):
        policy = Policy(model, backend=Backend(name, "test"), compute_dtype=torch.float32)
        model.set_attn_implementation(policy.backend.implementation)
        policy.zero_grad()
        logps = policy.logps(batch)
        logps.square().sum().backward()
        results.append((logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (want, want_grads), (got, got_grads) = results
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, atol=1e-4 * max(1.0, grad.abs().max().item()), rtol=1e-4)


def test_missing_plan_is_named():
    register_backends()
    model = tiny_model("llama")
    disable_dropout(model)
    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(Exception, match="LlamaAttention does not pass keyword arguments"):
        packed_attention("sdpa", model.model.layers[0].self_attn, query, query, query, attention_plan=None)
