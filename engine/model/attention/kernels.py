"""Calls of variable-length flash attention, in the form in which each library wants them.

All take half precision alone, queries [T, H, D] and the gathered keys and values [keys, K, D], D at most 256 and a
multiple of 8, int32 offsets on the device, and Python ints for the longest segments. Calls import what they need, so
that a missing library is an ``ImportError`` of the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch

from ...packing.layout import AttentionPlan
from .determinism import attend_deterministically


class AttendKeys(Protocol):
    """[T, H, D] of queries [T, H, D] and gathered keys and values [keys, K, D]."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: AttentionPlan,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


def flash3(query, key, value, plan, *, scaling, window, softcap=None) -> torch.Tensor:
    """FlashAttention 3, for Hopper."""
    from flash_attn_interface import flash_attn_varlen_func

    return _only_output(
        flash_attn_varlen_func(
            query,
            key,
            value,
            *_offsets(plan),
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            deterministic=True,
        )
    )


def flash(query, key, value, plan, *, scaling, window, softcap=None) -> torch.Tensor:
    """FlashAttention 2, from the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    return _only_output(
        flash_attn_varlen_func(
            query,
            key,
            value,
            *_offsets(plan),
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            deterministic=True,
        )
    )


def varlen(query, key, value, plan, *, scaling, window, softcap=None) -> torch.Tensor:
    """FlashAttention 2 as torch ships it."""
    assert softcap is None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _only_output(call_varlen(q, k, v, plan, scaling, window))

    return attend_deterministically(attend, query, key, value)


def call_varlen(query, key, value, plan: AttentionPlan, scaling: float, window: int | None, **options: Any) -> Any:
    """torch's ``varlen_attn`` with a pack's offsets, causal."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads without being asked to
    if query.shape[1] != key.shape[1] and "enable_gqa" in varlen_parameters():
        options["enable_gqa"] = True
    reach = (-1, 0) if window is None else (window - 1, 0)
    return varlen_attn(query, key, value, *_offsets(plan), scale=scaling, window_size=reach, **options)


def varlen_parameters() -> frozenset[str]:
    """Names of the parameters of this torch's ``varlen_attn``."""
    from torch.nn.attention import varlen as module

    return _parameters(module.varlen_attn)


@lru_cache(maxsize=4)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _offsets(plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k


def _only_output(output: Any) -> torch.Tensor:
    """Some builds of FlashAttention 3 return the log-sum-exp, too."""
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result
