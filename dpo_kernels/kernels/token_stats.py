"""Statistics of each row's distribution from the tiles of the forward product: no further product.

Legend: N rows, V vocabulary, T column tiles, K statistics in the order of TOKEN_STATS. z are logits, p their softmax.
Like the sums of `tile_logps`, partials leave the label out; merging adds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import on_device

TOKEN_STATS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
NUM_PARTIALS = 5


@triton.jit
def write_partials(z, exps, shift, cols, label_cols, V, partial_ptr, plane, mask):
    """Five numbers a row, `plane` elements apart; z is -inf where a column is the label's or lies past V."""
    inside = (cols < V)[None, :] & (cols[None, :] != label_cols[:, None])
    before = cols[None, :] < label_cols[:, None]
    weighted = tl.where(exps > 0.0, exps * (z - shift[:, None]), 0.0)
    tl.store(partial_ptr, tl.sum(weighted, axis=1), mask=mask)
    tl.store(partial_ptr + plane, tl.sum(exps * exps, axis=1), mask=mask)
    tl.store(partial_ptr + 2 * plane, tl.sum(tl.where(inside, z, 0.0), axis=1), mask=mask)
    tl.store(partial_ptr + 3 * plane, tl.max(tl.where(before, z, float("-inf")), axis=1), mask=mask)
    tl.store(partial_ptr + 4 * plane, tl.max(tl.where(before, float("-inf"), z), axis=1), mask=mask)


@triton.jit
def merge_token_stats_kernel(
    partial_ptr,
    tile_shift_ptr,
    tile_sum_ptr,
    labels_ptr,
    label_logit_ptr,
    logps_ptr,
    lse_ptr,
    stats_ptr,
    plane,
    N,
    V,
    num_tiles,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
    used = labels != ignore_index
    label_logit = tl.load(label_logit_ptr + rows, mask=used & (labels >= 0) & (labels < V), other=float("nan"))
    logps = tl.load(logps_ptr + rows, mask=used, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=used, other=0.0)
    p_label = tl.exp(logps)
    entropy = -p_label * logps
    squares = p_label * p_label
    logits = label_logit
    beaten = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        mask = (tiles < num_tiles)[:, None] & used[None, :]
        partial = tiles.to(tl.int64)[:, None] * N + rows[None, :]
        shift = tl.load(tile_shift_ptr + partial, mask=mask, other=float("-inf"))
        gap = tl.where(shift == float("-inf"), 0.0, (shift.to(tl.float64) - lse[None, :]).to(tl.float32))
        factor = tl.where(shift == float("-inf"), 0.0, tl.exp(gap))
        tile_sum = tl.load(tile_sum_ptr + partial, mask=mask, other=0.0)
        weighted = tl.load(partial_ptr + partial, mask=mask, other=0.0)
        entropy -= tl.sum(factor * (weighted + gap * tile_sum), axis=0)
        squares += tl.sum(factor * factor * tl.load(partial_ptr + plane + partial, mask=mask, other=0.0), axis=0)
        logits += tl.sum(tl.load(partial_ptr + 2 * plane + partial, mask=mask, other=0.0), axis=0)
        before = tl.load(partial_ptr + 3 * plane + partial, mask=mask, other=float("-inf"))
        after = tl.load(partial_ptr + 4 * plane + partial, mask=mask, other=float("-inf"))
        # Of equal logits the first is the top.
        better = (before >= label_logit[None, :]) | (after > label_logit[None, :])
        beaten = tl.maximum(beaten, tl.max((better & mask).to(tl.int32), axis=0))
    tl.store(stats_ptr + rows, tl.where(used, entropy, 0.0), mask=row_mask)
    tl.store(stats_ptr + N + rows, tl.where(used & (beaten == 0), 1.0, 0.0), mask=row_mask)
    tl.store(stats_ptr + 2 * N + rows, tl.where(used, logits / V, 0.0), mask=row_mask)
    tl.store(stats_ptr + 3 * N + rows, tl.where(used, tl.log(squares), 0.0), mask=row_mask)


def merge_token_stats(
    shift_TN: torch.Tensor,
    sum_TN: torch.Tensor,
    partials_5TN: torch.Tensor,
    labels_N: torch.Tensor,
    label_logit_N: torch.Tensor,
    logps_N: torch.Tensor,
    lse_N: torch.Tensor,
    *,
    V: int,
    ignore_index: int,
) -> torch.Tensor:
    """[K, N] in fp32 from partials over the whole vocabulary; a top-1 hit is 1, ignored rows are 0."""
    num_tiles, N = shift_TN.shape
    stats_KN = torch.empty(len(TOKEN_STATS), N, dtype=torch.float32, device=labels_N.device)
    with on_device(labels_N.device):
        merge_token_stats_kernel[(triton.cdiv(N, 32),)](
            partials_5TN,
            shift_TN,
            sum_TN,
            labels_N,
            label_logit_N,
            logps_N,
            lse_N,
            stats_KN,
            shift_TN.numel(),
            N,
            V,
            num_tiles,
            ignore_index,
            BLOCK_N=32,
            BLOCK_T=32,
            num_warps=4,
        )
    return stats_KN
