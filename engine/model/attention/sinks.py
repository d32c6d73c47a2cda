"""Attention sinks on flash kernels that know nothing of them, forward and backward.

A sink is one more score in the softmax of a query head, whose value is zero. With the log-sum-exp L of the other scores
and s the sink, the output is the kernel's times exp(L - M), M = logaddexp(L, s). A backward kernel takes the
probabilities from its log-sum-exp and from the output the sum that the softmax subtracts: given this output and M
instead of its own it gives the gradients with sinks. The sink's own is -sum_t exp(s - M) <grad_t, output_t>.

Shape suffixes: T queries, H query heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...packing.layout import AttentionPlan
from .determinism import deterministic_algorithms
from .kernels import call_varlen


class SinkKernel(NamedTuple):
    """The two halves of a flash kernel, given a plan, a factor of the scores and a window."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(query, key, value, plan, scaling, window) to output [T, H, D] and log-sum-exp, float32 [H, T]."""
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """(grad, (query, key, value), output, log-sum-exp, plan, scaling, window) to three gradients."""


def attend_with_sinks(
    kernel: SinkKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks_H: torch.Tensor,
    plan: AttentionPlan,
    *,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """[T, H, D]: attention of queries [T, H, D] over gathered keys and values [keys, K, D], with a sink a head."""
    result: torch.Tensor = _Sinks.apply(query, key, value, sinks_H, kernel, (plan, scaling, window))
    return result


class _Sinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, sinks_H, kernel: SinkKernel, options: tuple[Any, ...]) -> torch.Tensor:
        output_THD, lse_HT = kernel.forward(query, key, value, *options)
        assert lse_HT.shape == (query.shape[1], query.shape[0]), lse_HT.shape
        total_HT = torch.logaddexp(lse_HT, sinks_H.float()[:, None])
        output_THD = (output_THD.float() * (lse_HT - total_HT).exp().T[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks_H, output_THD, total_HT)
        ctx.kernel, ctx.options = kernel, options
        return output_THD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        query, key, value, sinks_H, output_THD, total_HT = ctx.saved_tensors
        grad_THD = grads[0].contiguous()
        found = ctx.kernel.backward(grad_THD, (query, key, value), output_THD, total_HT, *ctx.options)
        products_HT = (grad_THD.float() * output_THD.float()).sum(-1).T
        sink_grad_H = -((sinks_H.float()[:, None] - total_HT).exp() * products_HT).sum(1)
        return (*found, sink_grad_H.to(sinks_H.dtype), None, None)


def _flash_forward(query, key, value, plan, scaling, window) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    left, right = (-1, -1) if window is None else (window - 1, 0)
    output, lse, *_ = _flash_attn_varlen_forward(
        query, key, value,
        plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k,
        dropout_p=0.0, softmax_scale=scaling, causal=True, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return output, lse


def _flash_backward(grad, inputs, output, lse, plan, scaling, window):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    left, right = (-1, -1) if window is None else (window - 1, 0)
    gradients = tuple(torch.empty_like(x) for x in inputs)
    _flash_attn_varlen_backward(
        grad, *inputs, output, lse, *gradients,
        plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k,
        dropout_p=0.0, softmax_scale=scaling, causal=True, window_size_left=left, window_size_right=right,
        softcap=0.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    return gradients


def _varlen_forward(query, key, value, plan, scaling, window) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn.attention.varlen import AuxRequest

    output, lse = call_varlen(query, key, value, plan, scaling, window, return_aux=AuxRequest(lse=True))
    return output, lse


def _varlen_backward(grad, inputs, output, lse, plan, scaling, window):
    with deterministic_algorithms():
        return torch.ops.aten._flash_attention_backward(
            grad, *inputs, output, lse,
            plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k,
            0.0, window is None,
            torch.zeros(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device),
            scale=scaling,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )  # fmt: skip


FLASH_SINKS = SinkKernel(_flash_forward, _flash_backward)
VARLEN_SINKS = SinkKernel(_varlen_forward, _varlen_backward)
