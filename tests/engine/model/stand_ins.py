"""Stand-ins for variable-length flash attention on the CPU, which refuse what the libraries refuse.

Each takes the parameters that the library documents for its version (``SIGNATURES``), checks what its C++ checks before
it launches a kernel, and has the forward and backward pass of a flash kernel: the backward takes the probabilities from
the log-sum-exp and the sum that the softmax subtracts from the output. None has an autocast kernel, so none casts.
Without being asked for deterministic sums the gradient of the queries differs from run to run, as on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from engine.model.attention import choice

SIGNATURES = {
    # flash_attn.flash_attn_varlen_func, the same up to 2.8.3.post2 and in the repository on 2026-08-15
    "flash-attn 2.8.3": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 softmax_scale=None "
    "causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False "
    "block_table=None",
    # flash_attn_interface.flash_attn_varlen_func of 3.0.0, in the repository on 2026-08-15
    "flash-attn 3": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None seqused_k=None "
    "softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None window_size=(-1,-1) "
    "attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False",
    # torch.nn.attention.varlen.varlen_attn
    "torch 2.13": "query key value cu_seq_q cu_seq_k max_q max_k * return_aux=None scale=None window_size=(-1,-1) "
    "enable_gqa=False seqused_k=None block_table=None num_splits=None",
}
SIGNATURES |= dict.fromkeys(("torch 2.12", "torch 2.14", "torch 2.15"), SIGNATURES["torch 2.13"])
# the beta in the source package of flash-attn 2.8.3
SIGNATURES["flash-attn 3.0.0.b1"] = SIGNATURES["flash-attn 3"].removesuffix(" return_attn_probs=False")
SIGNATURES["torch 2.11"] = (
    "query key value cu_seq_q cu_seq_k max_q max_k * return_aux=None scale=None window_size=(-1,-1)"
)
"""Parameters by library and version, copied from the packages' sources; what follows ``*`` is by keyword alone."""


def signature(library: str) -> Signature:
    """The signature that ``SIGNATURES`` spells."""
    parameters, kind = [], Parameter.POSITIONAL_OR_KEYWORD
    for word in SIGNATURES[library].split():
        if word == "*":
            kind = Parameter.KEYWORD_ONLY
            continue
        name, _, default = word.partition("=")
        parameters.append(Parameter(name, kind, default=eval(default) if default else Parameter.empty))
    return Signature(parameters)


class Call(NamedTuple):
    """What a kernel is launched with."""

    cu_q: list[int]
    cu_k: list[int]
    scale: float
    left: int
    right: int
    softcap: float
    deterministic: Callable[[], bool]
    """Asked in the backward pass."""


def check_inputs(q, k, v, cu_q, cu_k, max_q, max_k) -> None:
    """What ``mha_varlen_fwd`` of flash-attn, and torch's copy of it, raises for."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query and key must have the same dtype")
    for name, offsets, longest in (("q", cu_q, max_q), ("k", cu_k, max_k)):
        if offsets.dtype != torch.int32:
            raise RuntimeError(f"cu_seqlens_{name} must have dtype int32")
        if offsets.device != q.device:
            raise RuntimeError(f"cu_seqlens_{name} must be on CUDA")
        if not offsets.is_contiguous():
            raise RuntimeError(f"cu_seqlens_{name} must be contiguous")
        if type(longest) is not int:
            raise TypeError(f"max_seqlen_{name} must be int, not {type(longest).__name__}")
        # a kernel reads past the end, or not to it, and says nothing
        assert longest == offsets.diff().max()
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[-1] % 8:
        raise RuntimeError("head_size must be a multiple of 8, this is ensured by padding!")
    if q.shape[1] % k.shape[1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    total_q, total_k = cu_q[-1].item(), cu_k[-1].item()
    if not (q.shape[0] == total_q and k.shape == v.shape == (total_k, k.shape[1], q.shape[-1])):
        raise RuntimeError("k must have shape (total_k, num_heads_k, head_size)")


def _segments(call: Call, q, k, v):
    """(rows of q, rows of k, scores before the cap, scores, keys, values) of each segment; masked scores are -inf."""
    groups = q.shape[1] // k.shape[1]
    for i in range(len(call.cu_q) - 1):
        rows, cols = slice(*call.cu_q[i : i + 2]), slice(*call.cu_k[i : i + 2])
        keys, values = (x[cols].float().repeat_interleave(groups, 1) for x in (k, v))
        scores = capped = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * call.scale
        if call.softcap:
            capped = call.softcap * torch.tanh(scores / call.softcap)
        query = torch.arange(scores.shape[1])[:, None] + scores.shape[2] - scores.shape[1]
        key = torch.arange(scores.shape[2])[None]
        hidden = torch.zeros(scores.shape[1:], dtype=torch.bool)
        if call.right >= 0:
            hidden |= key > query + call.right
        if call.left >= 0:
            hidden |= key < query - call.left
        yield rows, cols, scores, capped.masked_fill(hidden, float("-inf")), keys, values


@torch.autocast("cpu", enabled=False)
def kernel_forward(call: Call, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in the dtype of ``q``, and the log-sum-exp, float32 [heads, queries]."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows, _, _, scores, _, values in _segments(call, q, k, v):
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    return out, lse


@torch.autocast("cpu", enabled=False)
def kernel_backward(call: Call, dout, q, k, v, out, lse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in the dtype of ``q``; what ``mha_varlen_bwd`` raises for."""
    if not dout.dtype == out.dtype == q.dtype:
        raise RuntimeError("query and dout must have the same dtype")
    if lse.dtype != torch.float32 or any(x.stride(-1) != 1 for x in (dout, out)):
        raise RuntimeError("dout tensor must have contiguous last dimension")
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, cols, raw, scores, keys, values in _segments(call, q, k, v):
        grad = dout[rows].float()
        probabilities = (scores - lse[:, rows, None]).exp()
        subtracted = (grad * out[rows].float()).sum(-1).T[..., None]
        dscores = probabilities * (torch.einsum("qhd,khd->hqk", grad, values) - subtracted)
        if call.softcap:
            dscores = dscores * (1 - torch.tanh(raw / call.softcap).square())
        dscores = dscores * call.scale
        grouped = (len(keys), k.shape[1], -1, k.shape[2])
        dq_rows = torch.einsum("hqk,khd->qhd", dscores, keys)
        if not call.deterministic():
            dq_rows = dq_rows * (1 + torch.rand_like(dq_rows) / 64)
        dq[rows] = dq_rows.to(q.dtype)
        dk[cols] = torch.einsum("hqk,qhd->khd", dscores, q[rows].float()).reshape(grouped).sum(2).to(q.dtype)
        dv[cols] = torch.einsum("hqk,qhd->khd", probabilities, grad).reshape(grouped).sum(2).to(q.dtype)
    return dq, dk, dv


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, call):
        out, lse = kernel_forward(call, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, lse = ctx.saved_tensors
        return *kernel_backward(ctx.call, dout.contiguous(), q, k, v, out, lse), None


def _call(cu_q, cu_k, scale, window, causal, softcap, deterministic) -> Call:
    left, right = window
    return Call(cu_q.tolist(), cu_k.tolist(), scale, left, 0 if causal else right, softcap, deterministic)


def flash_function(library: str) -> Callable[..., Any]:
    """``flash_attn_varlen_func`` of flash-attn 2 or 3."""
    parameters = signature(library)

    def flash_attn_varlen_func(*args, **kwargs):
        given = parameters.bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        q, k, v = a["q"], a["k"], a["v"]
        width = -q.shape[-1] % 8
        pads = library == "flash-attn 2.8.3"
        padded = [torch.nn.functional.pad(x, (0, width)) for x in (q, k, v)] if pads else [q, k, v]
        offsets = (a["cu_seqlens_q"], a["cu_seqlens_k"], a["max_seqlen_q"], a["max_seqlen_k"])
        check_inputs(*padded, *offsets)
        # the backward pass of FlashAttention 3 ignores the flag beyond 192
        deterministic = a["deterministic"] and (pads or q.shape[-1] <= 192)
        call = _call(
            *offsets[:2], a["softmax_scale"], a["window_size"], a["causal"], a["softcap"], lambda: deterministic
        )
        return _Kernel.apply(*padded, call)[0][..., : q.shape[-1]]

    return flash_attn_varlen_func


def varlen_function(library: str) -> Callable[..., Any]:
    """``varlen_attn`` of a version of torch."""
    parameters = signature(library)

    def varlen_attn(*args, **kwargs):
        given = parameters.bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        q, k = a["query"], a["key"]
        if "enable_gqa" in a and not a["enable_gqa"] and q.shape[1] != k.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        if library == "torch 2.15" and a["scale"] is not None and not a["scale"] > 0:
            raise ValueError("scale must be greater than 0")
        offsets = (a["cu_seq_q"], a["cu_seq_k"], a["max_q"], a["max_k"])
        check_inputs(q, k, a["value"], *offsets)
        causal = a["window_size"] == (-1, 0)
        call = _call(*offsets[:2], a["scale"], a["window_size"], causal, 0.0, torch_is_deterministic)
        out, lse = _Kernel.apply(q, k, a["value"], call)
        return (out, lse) if a["return_aux"] is not None and a["return_aux"].lse else out

    varlen_attn.__signature__ = parameters
    return varlen_attn


def torch_is_deterministic() -> bool:
    """What torch's copy of the kernel asks before it adds without atomics."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def aten_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """``aten::_flash_attention_backward``."""
    check_inputs(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert dropout_p == 0.0
    window = (window_size_left, window_size_right)
    call = _call(cum_seq_q, cum_seq_k, scale, window, is_causal, 0.0, torch_is_deterministic)
    return kernel_backward(call, grad_out, query, key, value, out, logsumexp)


def flash_halves() -> dict[str, Callable[..., Any]]:
    """The two halves of ``flash_attn_varlen_func`` in ``flash_attn.flash_attn_interface`` of flash-attn 2.8.3."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = (window_size_left, window_size_right)
        call = _call(cu_seqlens_q, cu_seqlens_k, softmax_scale, window, causal, softcap, lambda: True)
        return *kernel_forward(call, q, k, v), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = (window_size_left, window_size_right)
        call = _call(cu_seqlens_q, cu_seqlens_k, softmax_scale, window, causal, softcap, lambda: deterministic)
        for place, value in zip((dq, dk, dv), kernel_backward(call, dout, q, k, v, out, softmax_lse), strict=True):
            place.copy_(value)

    return {f.__name__: f for f in (_flash_attn_varlen_forward, _flash_attn_varlen_backward)}


def module(name: str, **contents: Any) -> ModuleType:
    """A module that looks installed."""
    result = ModuleType(name)
    result.__spec__ = ModuleSpec(name, None, origin=name)
    vars(result).update(contents)
    return result


def install(monkeypatch: pytest.MonkeyPatch, torch_version: str = "torch 2.13") -> None:
    """Put the stand-ins where the libraries would be, and let kernels run on the CPU."""
    flash = flash_function("flash-attn 2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn", flash_attn_varlen_func=flash))
    interface = module("flash_attn.flash_attn_interface", **flash_halves())
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    flash3 = module("flash_attn_interface", flash_attn_varlen_func=flash_function("flash-attn 3"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash3)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_function(torch_version))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", aten_backward)
    monkeypatch.setattr(choice, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(choice, "NATIVE_DEVICES", ())
    choice._probe.cache_clear()
