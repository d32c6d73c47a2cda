"""From partials of tiles to numbers of rows: log-sum-exp and log-prob, merged slice by slice in a fixed order.

Legend: T rows, V vocabulary (or a slice of it), J column tiles.
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
        "T",
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
    T,
    V,
    num_tiles,
    ignore_index,
    HAS_STATE: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Without FINISH the merged shift and sum go back to row_shift and row_sum; HAS_STATE starts from them."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    row_shift = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_STATE:
        row_shift = tl.load(row_shift_ptr + rows, mask=row_mask, other=0.0)
        row_sum = tl.load(row_sum_ptr + rows, mask=row_mask, other=1.0)
    for start in range(0, num_tiles, BLOCK_J):
        tiles = start + tl.arange(0, BLOCK_J)
        mask = (tiles < num_tiles)[:, None] & row_mask[None, :]
        partial = tiles.to(tl.int64)[:, None] * T + rows[None, :]
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


class TilePartials(NamedTuple):
    """Partials of each row over tiles of `width` columns: sum of exp(z - shift) over all columns but the label's."""

    shift_JT: torch.Tensor
    sum_JT: torch.Tensor
    width: int
    token_stats_5JT: torch.Tensor | None = None


class RowState(NamedTuple):
    """Of each row, over the slices met so far: shift, sum of exp(z - shift), label's logit once a slice held it."""

    shift_T: torch.Tensor
    sum_T: torch.Tensor
    label_logit_T: torch.Tensor
    token_stats_7T: torch.Tensor | None = None

    @classmethod
    def empty(cls, hidden_TD: torch.Tensor, *, token_stats: bool) -> RowState:
        """Room for T rows."""
        numbers = 3 + (NUM_STATE if token_stats else 0)
        found = torch.empty(numbers, hidden_TD.shape[0], dtype=torch.float32, device=hidden_TD.device)
        return cls(found[0], found[1], found[2], found[3:] if token_stats else None)


def merge_partials(partials: TilePartials, state: RowState, *, first: bool) -> None:
    """Merge the partials of one more slice into `state`, in place; `first` starts it anew."""
    _launch_merge(partials, state, None, None, None, V=0, ignore_index=0, first=first)
    merge_tokens(partials, state, first=first)


def merge_tokens(partials: TilePartials, state: RowState, *, first: bool) -> None:
    """Of `merge_partials` the part that is for statistics of tokens."""
    if partials.token_stats_5JT is not None:
        assert state.token_stats_7T is not None
        of_tiles = (partials.shift_JT, partials.sum_JT, partials.token_stats_5JT)
        merge_token_stats(state.token_stats_7T, *of_tiles, first=first)


def finish_rows(
    partials: TilePartials, state: RowState, labels_T: torch.Tensor, *, V: int, ignore_index: int, first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps_T, lse_T) over a vocabulary of V, from `state` (unless `first`) and the partials of the last slice."""
    logps_T = torch.empty_like(state.label_logit_T)
    lse_T = torch.empty_like(logps_T, dtype=torch.float64)
    _launch_merge(partials, state, labels_T, logps_T, lse_T, V=V, ignore_index=ignore_index, first=first)
    return logps_T, lse_T


def _launch_merge(
    partials: TilePartials,
    state: RowState,
    labels_T: torch.Tensor | None,
    logps_T: torch.Tensor | None,
    lse_T: torch.Tensor | None,
    *,
    V: int,
    ignore_index: int,
    first: bool,
) -> None:
    num_tiles, T = partials.shift_JT.shape
    with on_device(partials.shift_JT.device):
        merge_stats_kernel[(triton.cdiv(T, MERGED_ROWS),)](
            partials.shift_JT,
            partials.sum_JT,
            state.label_logit_T,
            labels_T,
            state.shift_T,
            state.sum_T,
            logps_T,
            lse_T,
            T,
            V,
            num_tiles,
            ignore_index,
            HAS_STATE=not first,
            FINISH=labels_T is not None,
            BLOCK_N=MERGED_ROWS,
            BLOCK_J=64,
            num_warps=4,
            **COMPILATION,
        )
