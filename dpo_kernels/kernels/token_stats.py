"""Statistics of each row's distribution from the tiles of the forward product: no further product.

Legend: T rows, V vocabulary, J column tiles, K statistics in the order of TOKEN_STATS. z are logits, p their softmax.
Like the sums of `tile_logps`, partials leave the label out; finishing adds it.

1. write_partials: five numbers of each row and tile, in the epilogue of the forward product.
2. merge_token_stats_kernel: the tiles of a slice of the vocabulary into a running state of each row, in a fixed order.
3. finish_token_stats_kernel: the state over the whole vocabulary to the statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import COMPILATION, on_device

TOKEN_STATS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
NUM_PARTIALS = 5
NUM_STATE = 7
"""Numbers of a row's state: shift, sum of exp(z - shift), and what the partials are, on that shift."""


@triton.jit
def write_partials(z, exps, shift, cols, label_cols, V, partial_ptr, plane, mask):
    """Five numbers a row, `plane` elements apart; z is -inf where a column is the label's or lies past V."""
    inside = (cols < V)[None, :] & (cols[None, :] != label_cols[:, None])
    before = cols[None, :] < label_cols[:, None]
    plane = tl.cast(plane, tl.int64)
    weighted = tl.where(exps > 0.0, exps * (z - shift[:, None]), 0.0)
    tl.store(partial_ptr, tl.sum(weighted, axis=1), mask=mask)
    tl.store(partial_ptr + plane, tl.sum(exps * exps, axis=1), mask=mask)
    tl.store(partial_ptr + 2 * plane, tl.sum(tl.where(inside, z, 0.0), axis=1), mask=mask)
    tl.store(partial_ptr + 3 * plane, tl.max(tl.where(before, z, float("-inf")), axis=1), mask=mask)
    tl.store(partial_ptr + 4 * plane, tl.max(tl.where(before, float("-inf"), z), axis=1), mask=mask)


@triton.jit(do_not_specialize=["partial_ptr", "tile_shift_ptr", "tile_sum_ptr", "state_ptr", "plane", "T", "num_tiles"])
def merge_token_stats_kernel(
    partial_ptr,
    tile_shift_ptr,
    tile_sum_ptr,
    state_ptr,
    plane,
    T,
    num_tiles,
    FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The tiles of one more slice into the state; FIRST starts it."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    plane = tl.cast(plane, tl.int64)
    state_plane = tl.cast(T, tl.int64)
    state_ptrs = state_ptr + rows
    if FIRST:
        row_shift = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
        row_before = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
        row_after = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
        row_weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
        row_squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
        row_logits = tl.zeros((BLOCK_N,), dtype=tl.float32)
    else:
        row_shift = tl.load(state_ptrs, mask=row_mask, other=0.0)
        row_sum = tl.load(state_ptrs + state_plane, mask=row_mask, other=0.0)
        row_weighted = tl.load(state_ptrs + 2 * state_plane, mask=row_mask, other=0.0)
        row_squares = tl.load(state_ptrs + 3 * state_plane, mask=row_mask, other=0.0)
        row_logits = tl.load(state_ptrs + 4 * state_plane, mask=row_mask, other=0.0)
        row_before = tl.load(state_ptrs + 5 * state_plane, mask=row_mask, other=0.0)
        row_after = tl.load(state_ptrs + 6 * state_plane, mask=row_mask, other=0.0)
    for start in range(0, num_tiles, BLOCK_J):
        tiles = start + tl.arange(0, BLOCK_J)
        mask = (tiles < num_tiles)[:, None] & row_mask[None, :]
        partial = tiles.to(tl.int64)[:, None] * T + rows[None, :]
        shift = tl.load(tile_shift_ptr + partial, mask=mask, other=float("-inf"))
        tile_sum = tl.load(tile_sum_ptr + partial, mask=mask, other=0.0)
        new_shift = tl.maximum(row_shift, tl.max(shift, axis=0))
        # Of a part without finite logits the sums are 0, whatever the gap.
        row_gap = tl.where(row_shift == float("-inf"), 0.0, row_shift - new_shift)
        gap = tl.where(shift == float("-inf"), 0.0, shift - new_shift[None, :])
        row_factor, factor = tl.exp(row_gap), tl.exp(gap)
        weighted = tl.load(partial_ptr + partial, mask=mask, other=0.0)
        squares = tl.load(partial_ptr + plane + partial, mask=mask, other=0.0)
        logits = tl.load(partial_ptr + 2 * plane + partial, mask=mask, other=0.0)
        before = tl.load(partial_ptr + 3 * plane + partial, mask=mask, other=float("-inf"))
        after = tl.load(partial_ptr + 4 * plane + partial, mask=mask, other=float("-inf"))
        row_weighted = row_factor * (row_weighted + row_gap * row_sum)
        row_weighted += tl.sum(factor * (weighted + gap * tile_sum), axis=0)
        row_squares = row_factor * row_factor * row_squares + tl.sum(factor * factor * squares, axis=0)
        row_sum = row_factor * row_sum + tl.sum(factor * tile_sum, axis=0)
        row_logits += tl.sum(logits, axis=0)
        row_before = tl.maximum(row_before, tl.max(before, axis=0))
        row_after = tl.maximum(row_after, tl.max(after, axis=0))
        row_shift = new_shift
    tl.store(state_ptrs, row_shift, mask=row_mask)
    tl.store(state_ptrs + state_plane, row_sum, mask=row_mask)
    tl.store(state_ptrs + 2 * state_plane, row_weighted, mask=row_mask)
    tl.store(state_ptrs + 3 * state_plane, row_squares, mask=row_mask)
    tl.store(state_ptrs + 4 * state_plane, row_logits, mask=row_mask)
    tl.store(state_ptrs + 5 * state_plane, row_before, mask=row_mask)
    tl.store(state_ptrs + 6 * state_plane, row_after, mask=row_mask)


@triton.jit(do_not_specialize=["state_ptr", "labels_ptr", "label_logit_ptr", "logps_ptr", "lse_ptr", "stats_ptr", "T"])
def finish_token_stats_kernel(
    state_ptr,
    labels_ptr,
    label_logit_ptr,
    logps_ptr,
    lse_ptr,
    stats_ptr,
    T,
    V,
    ignore_index,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    plane = tl.cast(T, tl.int64)
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
    used = labels != ignore_index
    label_logit = tl.load(label_logit_ptr + rows, mask=used & (labels >= 0) & (labels < V), other=float("nan"))
    logps = tl.load(logps_ptr + rows, mask=used, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=used, other=0.0)
    state_ptrs = state_ptr + rows
    shift = tl.load(state_ptrs, mask=used, other=0.0)
    row_sum = tl.load(state_ptrs + plane, mask=used, other=0.0)
    weighted = tl.load(state_ptrs + 2 * plane, mask=used, other=0.0)
    squares = tl.load(state_ptrs + 3 * plane, mask=used, other=0.0)
    logits = tl.load(state_ptrs + 4 * plane, mask=used, other=0.0)
    before = tl.load(state_ptrs + 5 * plane, mask=used, other=0.0)
    after = tl.load(state_ptrs + 6 * plane, mask=used, other=0.0)
    gap = tl.where(shift == float("-inf"), 0.0, (shift.to(tl.float64) - lse).to(tl.float32))
    factor = tl.exp(gap)
    p_label = tl.exp(logps)
    # The limit of p log p at p = 0.
    label_entropy = tl.where(logps == float("-inf"), 0.0, -p_label * logps)
    entropy = label_entropy - factor * (weighted + gap * row_sum)
    squares = p_label * p_label + factor * factor * squares
    # Of equal logits the first is the top; a row without a log-prob has none.
    hit = (before < label_logit) & (after <= label_logit) & (logps == logps)
    stats_ptrs = stats_ptr + rows
    tl.store(stats_ptrs, tl.where(used, entropy, 0.0), mask=row_mask)
    tl.store(stats_ptrs + plane, tl.where(used & hit, 1.0, 0.0), mask=row_mask)
    tl.store(stats_ptrs + 2 * plane, tl.where(used, (logits + label_logit) / V, 0.0), mask=row_mask)
    tl.store(stats_ptrs + 3 * plane, tl.where(used, tl.log(squares), 0.0), mask=row_mask)


def merge_token_stats(
    state_7T: torch.Tensor,
    shift_JT: torch.Tensor,
    sum_JT: torch.Tensor,
    partials_5JT: torch.Tensor,
    *,
    first: bool,
) -> None:
    """Merge the partials of one more slice into the state, in place; `first` starts it anew."""
    num_tiles, T = shift_JT.shape
    with on_device(state_7T.device):
        merge_token_stats_kernel[(triton.cdiv(T, 32),)](
            partials_5JT,
            shift_JT,
            sum_JT,
            state_7T,
            partials_5JT.stride(0),
            T,
            num_tiles,
            FIRST=first,
            BLOCK_N=32,
            BLOCK_J=32,
            num_warps=4,
            **COMPILATION,
        )


def finish_token_stats(
    state_7T: torch.Tensor,
    labels_T: torch.Tensor,
    label_logit_T: torch.Tensor,
    logps_T: torch.Tensor,
    lse_T: torch.Tensor,
    *,
    V: int,
    ignore_index: int,
) -> torch.Tensor:
    """[K, T] in fp32 from a state over the whole vocabulary; a top-1 hit is 1, ignored rows are 0."""
    T = labels_T.shape[0]
    stats_KT = torch.empty(len(TOKEN_STATS), T, dtype=torch.float32, device=labels_T.device)
    with on_device(labels_T.device):
        finish_token_stats_kernel[(triton.cdiv(T, 128),)](
            state_7T,
            labels_T,
            label_logit_T,
            logps_T,
            lse_T,
            stats_KT,
            T,
            V,
            ignore_index,
            BLOCK_N=128,
            num_warps=4,
            **COMPILATION,
        )
    return stats_KT
