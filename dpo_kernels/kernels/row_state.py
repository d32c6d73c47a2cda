"""From partials of tiles to numbers of rows: log-sum-exp and log-prob, merged slice by slice in a fixed order.

Legend: N rows, V vocabulary (or a slice of it), T column tiles.
The sums that `tile_logps` leaves of each tile are on a shift of the tile's own, and without the label; here they meet
on one shift of the row, and the label comes back in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import COMPILATION, on_device
from dpo_kernels.kernels.logits_tile import softplus
from dpo_kernels.kernels.token_stats import NUM_STATE, merge_token_stats

MERGED_ROWS = 16
"""Rows that one program merges: few, so that a thousand rows give work to half of a large GPU."""


@triton.jit(
    do_not_specialize=[
        "tile_shift_ptr",
        "tile_sum_ptr",
        "label_logit_ptr",
        "labels_ptr",
        "row_shift_ptr",
        "row_sum_ptr",
        "logps_ptr",
        "lse_ptr",
        "N",
        "V",
        "num_tiles",
    ]
)
def merge_stats_kernel(
    tile_shift_ptr,
    tile_sum_ptr,
    label_logit_ptr,
    labels_ptr,
    row_shift_ptr,
    row_sum_ptr,
    logps_ptr,
    lse_ptr,
    N,
    V,
    num_tiles,
    ignore_index,
    HAS_STATE: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Without FINISH the merged shift and sum go back to row_shift and row_sum; HAS_STATE starts from them."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    row_shift = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_STATE:
        row_shift = tl.load(row_shift_ptr + rows, mask=row_mask, other=0.0)
        row_sum = tl.load(row_sum_ptr + rows, mask=row_mask, other=1.0)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        mask = (tiles < num_tiles)[:, None] & row_mask[None, :]
        partial = tiles.to(tl.int64)[:, None] * N + rows[None, :]
        tile_shift = tl.load(tile_shift_ptr + partial, mask=mask, other=float("-inf"))
        tile_sum = tl.load(tile_sum_ptr + partial, mask=mask, other=0.0)
        new_shift = tl.maximum(row_shift, tl.max(tile_shift, axis=0))
        finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
        row_sum = row_sum * tl.exp(row_shift - finite)
        row_sum += tl.sum(tile_sum * tl.exp(tile_shift - finite[None, :]), axis=0)
        row_shift = new_shift

    if FINISH:
        labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
        in_vocab = (labels >= 0) & (labels < V)
        # The logit of a label outside the vocabulary was never written: such a row is NaN, loud and the same always.
        label_logit = tl.load(label_logit_ptr + rows, mask=row_mask & in_vocab, other=float("nan"))
        # A softmax with an infinite logit is no number; of the label's own the sums, which leave it out, know nothing.
        label_logit = tl.where(label_logit == float("inf"), float("nan"), label_logit)
        ignored = labels == ignore_index
        # The shift is a logit, too: their difference is exact where their size would swallow the logarithm.
        log_sum = tl.log(row_sum)
        gap = (row_shift - label_logit) + log_sum
        others = row_shift.to(tl.float64) + log_sum.to(tl.float64)
        lse = tl.where(gap > 0, others, label_logit.to(tl.float64)) + softplus(-tl.abs(gap)).to(tl.float64)
        tl.store(logps_ptr + rows, tl.where(ignored, 0.0, -softplus(gap)), mask=row_mask)
        tl.store(lse_ptr + rows, tl.where(ignored, others, lse), mask=row_mask)
    else:
        tl.store(row_shift_ptr + rows, row_shift, mask=row_mask)
        tl.store(row_sum_ptr + rows, row_sum, mask=row_mask)


class TileStats(NamedTuple):
    """Partials of each row over tiles of `width` columns: sum of exp(z - shift) over all columns but the label's."""

    shift_TN: torch.Tensor
    sum_TN: torch.Tensor
    width: int
    token_stats_5TN: torch.Tensor | None = None


class RowState(NamedTuple):
    """Of each row, over the slices met so far: shift, sum of exp(z - shift), label's logit once a slice held it."""

    shift_N: torch.Tensor
    sum_N: torch.Tensor
    label_logit_N: torch.Tensor
    token_stats_7N: torch.Tensor | None = None

    @classmethod
    def empty(cls, hidden_ND: torch.Tensor, *, token_stats: bool) -> RowState:
        """Room for N rows."""
        numbers = 3 + (NUM_STATE if token_stats else 0)
        found = torch.empty(numbers, hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        return cls(found[0], found[1], found[2], found[3:] if token_stats else None)


def merge_stats(stats: TileStats, state: RowState, *, first: bool) -> None:
    """Merge the partials of one more slice into `state`, in place; `first` starts it anew."""
    _launch_merge(stats, state, None, None, None, V=0, ignore_index=0, first=first)
    merge_tokens(stats, state, first=first)


def merge_tokens(stats: TileStats, state: RowState, *, first: bool) -> None:
    """Of `merge_stats` the part that is for statistics of tokens."""
    if stats.token_stats_5TN is not None:
        assert state.token_stats_7N is not None
        partials = (stats.shift_TN, stats.sum_TN, stats.token_stats_5TN)
        merge_token_stats(state.token_stats_7N, *partials, first=first)


def finish_stats(
    stats: TileStats, state: RowState, labels_N: torch.Tensor, *, V: int, ignore_index: int, first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps_N, lse_N) over a vocabulary of V, from `state` (unless `first`) and the partials of the last slice."""
    logps_N = torch.empty_like(state.label_logit_N)
    lse_N = torch.empty_like(logps_N, dtype=torch.float64)
    _launch_merge(stats, state, labels_N, logps_N, lse_N, V=V, ignore_index=ignore_index, first=first)
    return logps_N, lse_N


def _launch_merge(
    stats: TileStats,
    state: RowState,
    labels_N: torch.Tensor | None,
    logps_N: torch.Tensor | None,
    lse_N: torch.Tensor | None,
    *,
    V: int,
    ignore_index: int,
    first: bool,
) -> None:
    num_tiles, N = stats.shift_TN.shape
    with on_device(stats.shift_TN.device):
        merge_stats_kernel[(triton.cdiv(N, MERGED_ROWS),)](
            stats.shift_TN,
            stats.sum_TN,
            state.label_logit_N,
            labels_N,
            state.shift_N,
            state.sum_N,
            logps_N,
            lse_N,
            N,
            V,
            num_tiles,
            ignore_index,
            HAS_STATE=not first,
            FINISH=labels_N is not None,
            BLOCK_N=MERGED_ROWS,
            BLOCK_T=64,
            num_warps=4,
            **COMPILATION,
        )
