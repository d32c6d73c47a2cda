"""Attention one query segment at a time: runs on any device, for any head dimension, with all that models ask for.

Shape suffixes: B = 1, H query heads, K key heads, T packed tokens, D head dimension, S sinks, one a query head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ...packing.layout import AttentionPlan
from .determinism import Attend, attend_deterministically

OPEN_SCORES = 2**25
"""Scores that open attention holds at a time, over all heads: 128 MiB in float32, and a few times that in backward."""


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    *,
    scaling: float,
    window: int | None,
    chunk: int | None = None,
) -> torch.Tensor:
    """[1, T, H, D]: ``scaled_dot_product_attention`` of each segment."""
    limit = min(window or plan.max_seqlen_k, chunk or plan.max_seqlen_k)
    grouped = query.shape[1] != key.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        num_queries, num_keys = q.shape[2], k.shape[2]
        plain = num_queries == num_keys <= limit
        mask = None if plain else _shared_mask(plan, num_queries, num_keys, q.device, window=window, chunk=chunk)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scaling, enable_gqa=grouped)

    if not query.is_cuda:
        return _per_segment(query, key, value, plan, attend)
    return attend_deterministically(lambda q, k, v: _per_segment(q, k, v, plan, attend), query, key, value)


def open_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[1, T, H, D]: scores in the open, for what fused attention lacks: capped scores (Gemma 2), sinks (gpt-oss).

    A segment is done in blocks of queries that need at most ``OPEN_SCORES`` scores, computed anew in the backward pass,
    and against no more keys than its window reaches: memory does not grow with the square of the length.
    """
    groups = query.shape[1] // key.shape[1]

    def attend_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(2, 3)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = _causal_mask(q.shape[2], k.shape[2], q.device, window=window)
        scores = scores.masked_fill(~mask, float("-inf")).to(torch.promote_types(q.dtype, torch.float32))
        if sinks is not None:
            sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
            return torch.cat([scores, sink], dim=3).softmax(dim=3)[..., :-1].to(v.dtype) @ v
        return scores.softmax(dim=3).to(v.dtype) @ v

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        num_queries, num_keys = q.shape[2], k.shape[2]
        reach = num_keys if window is None else min(num_keys, window)
        rows = max(1, OPEN_SCORES // (q.shape[1] * num_keys))
        if rows >= num_queries:
            return attend_block(q, k, v)
        outputs, last = [], num_keys - num_queries
        for block in q.split(rows, dim=2):
            first = max(0, last + 1 - reach)
            last += block.shape[2]
            seen = [x.narrow(2, first, last - first) for x in (k, v)]
            outputs.append(checkpoint(attend_block, block, *seen, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(outputs, dim=2)

    return _per_segment(query, key, value, plan, attend)


def _per_segment(
    query_BHTD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, plan: AttentionPlan, attend: Attend
) -> torch.Tensor:
    """Call ``attend(query, key, value)`` for each segment; [B, T, H, D]. Splitting once keeps backward linear in T."""
    sizes = [s.num_queries for s in plan.segments]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query_BHTD, key_BKTD, value_BKTD))
    owner = {s.start: i for i, s in enumerate(plan.segments)}
    outputs = []
    for segment, query, key, value in zip(plan.segments, queries, keys, values, strict=True):
        prefix = segment.prefix_stop - segment.prefix_start
        if prefix:
            first = owner[segment.prefix_start]
            key = torch.cat([keys[first].narrow(2, 0, prefix), key], dim=2)
            value = torch.cat([values[first].narrow(2, 0, prefix), value], dim=2)
        outputs.append(attend(query, key, value).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _shared_mask(
    plan: AttentionPlan,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
    window: int | None,
    chunk: int | None,
) -> torch.Tensor:
    """The mask of a segment, kept with the pack so that its layers share it."""
    shape = (num_queries, num_keys, device, window, chunk)
    if shape not in plan.masks:
        plan.masks[shape] = _causal_mask(num_queries, num_keys, device, window=window, chunk=chunk)
    return plan.masks[shape]


def _causal_mask(
    num_queries: int, num_keys: int, device: torch.device, *, window: int | None, chunk: int | None = None
) -> torch.Tensor:
    """bool [queries, keys], True where attended; the last query is aligned with the last key."""
    offset = num_keys - num_queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(offset)
    if window is not None:
        mask.triu_(offset - window + 1)
    if chunk is not None:
        # keys begin with the first token of the sequence, so their index is their position
        chunk_of_key = torch.arange(num_keys, device=device) // chunk
        mask &= chunk_of_key[offset:, None] == chunk_of_key
    return mask
