"""Log-probs of labels from hidden states and a head weight, without the logits: one product over the head (1G).

Legend: T rows, D hidden size, V vocabulary (or a slice of it), J column tiles.
1. linear_stats_fwd_kernel: logits tile -> per row a shift, the sum of exp(z - shift), and the label's logit. On request
   also exp(z - shift) itself, times the softcap's part of dz/dbiased: the raw material of every gradient. The rest of
   dz/dbiased, one number, comes later: in float16 there is no room for it beside e^10.
2. `row_state`: the J partials of a row -> log-sum-exp and log-prob, in a fixed order.
Sums leave the label out, so that 1 - p[label] keeps its accuracy when p[label] is near 1. Tiles share no state: no
atomics, no locks, and two runs are bitwise equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dpo_kernels.head import Head
from dpo_kernels.kernels import hopper
from dpo_kernels.kernels.launch import MAX_BLOCK, TileLaunch, epilogue_arguments, on_device
from dpo_kernels.kernels.logits_tile import (
    bias_tile,
    cap_slope,
    cap_slope_of,
    exp,
    final_logits,
    local_labels,
    tile_position,
    tile_product,
)
from dpo_kernels.kernels.row_state import RowState, TilePartials, finish_rows, merge_partials, merge_tokens
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_mass import tile_mass
from dpo_kernels.kernels.token_stats import NUM_PARTIALS, finish_token_stats, write_partials

PARTIAL_BYTES = 128 * 2**20
"""Partials of rows and tiles that are held at a time: wider vocabularies, or more rows, are merged slice by slice."""


@triton.jit(
    do_not_specialize=[
        "labels_ptr",
        "row_shift_ptr",
        "tile_shift_ptr",
        "tile_sum_ptr",
        "label_logit_ptr",
        "token_stats_ptr",
        "token_stats_stride",
        "first_col",
        "T",
    ]
)
def linear_stats_fwd_kernel(
    hidden,
    weight,
    bias_ptr,
    labels_ptr,
    row_shift_ptr,
    tile_shift_ptr,
    tile_sum_ptr,
    label_logit_ptr,
    exp_ptr,
    token_stats_ptr,
    hidden_stride,
    weight_stride,
    exp_stride,
    token_stats_stride,
    first_col,
    T,
    V,
    D,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SHIFT: tl.constexpr,
    WRITE_EXP: tl.constexpr,
    TOKEN_STATS: tl.constexpr,
    SHIFT_SLACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    JOINED: tl.constexpr,
):
    tile_n, tile_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP_N)
    row_start = tile_n * BLOCK_N
    col_start = tile_v * BLOCK_V
    rows = row_start + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    # What belongs to rows is loaded ahead of the product, which hides how long that takes.
    label_cols = local_labels(tl.load(labels_ptr + rows, mask=row_mask, other=-1), first_col)
    row_shift = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_ROW_SHIFT:
        row_shift = tl.load(row_shift_ptr + rows, mask=row_mask, other=0.0)
    owns_label = (label_cols >= col_start) & (label_cols < tl.minimum(col_start + BLOCK_V, V))
    has_label = tl.max(owns_label.to(tl.int32), axis=0) > 0
    cols = col_start + tl.arange(0, BLOCK_V)
    acc = bias_tile(bias_ptr, cols, V, BLOCK_N, BLOCK_V, HAS_BIAS)
    acc = tile_product(
        acc, hidden, weight, hidden_stride, weight_stride, row_start, col_start, T, V, D,
        BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
    )  # fmt: skip

    z = final_logits(acc, logit_scale, softcap, temperature, HAS_SOFTCAP, HAS_SCALE)
    # Most tiles hold no row's label and end before V: they skip what is for the others.
    lanes = tl.arange(0, BLOCK_V)
    if col_start + BLOCK_V > V:
        z = tl.where((lanes < V - col_start)[None, :], z, float("-inf"))
    if has_label:
        is_label = lanes[None, :] == (label_cols - col_start)[:, None]
        label_logit = tl.sum(tl.where(is_label, z, 0.0), axis=1)
        tl.store(label_logit_ptr + rows, label_logit, mask=row_mask & owns_label)
        z = tl.where(is_label, float("-inf"), z)
    # Wide tiles in halves: a whole one beside its exponentials would spill registers.
    HALVES: tl.constexpr = 2 if SPLIT else 1
    HALF: tl.constexpr = BLOCK_V // HALVES
    if SPLIT:
        left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        left_biased, right_biased = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, HALF)), (0, 2, 1)))
    else:
        left, left_biased = z, acc
    shift = tile_shift(z, row_shift, HAS_ROW_SHIFT, SHIFT_SLACK)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for half in tl.static_range(HALVES):
        part = left if half == 0 else right
        half_start = col_start + half * HALF
        if not JOINED:
            shift = tile_shift(part, row_shift, HAS_ROW_SHIFT, SHIFT_SLACK)
        # Nothing but the label, or a bias of -inf all over: the sum is 0, not exp(-inf + inf).
        exps = exp(part - tl.where(shift == float("-inf"), 0.0, shift)[:, None])
        total += tl.sum(exps, axis=1)
        if not JOINED or half == HALVES - 1:
            partial = (half_start // (BLOCK_V if JOINED else HALF)).to(tl.int64) * T + rows
            tl.store(tile_shift_ptr + partial, shift, mask=row_mask)
            tl.store(tile_sum_ptr + partial, total, mask=row_mask)
            total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        half_cols = half_start + tl.arange(0, HALF)
        if TOKEN_STATS:
            tl.static_assert(not JOINED or not SPLIT)
            partial_ptrs = token_stats_ptr + partial
            write_partials(part, exps, shift, half_cols, label_cols, V, partial_ptrs, token_stats_stride, row_mask)
        if WRITE_EXP:
            if HAS_SOFTCAP:
                if TOKEN_STATS:
                    # Three tiles alive would take all registers; where an exponential is 0, z may be infinite.
                    exps *= cap_slope(tl.where(exps > 0.0, part, 0.0), softcap, temperature)
                else:
                    exps *= cap_slope_of(left_biased if half == 0 else right_biased, logit_scale, softcap)
            # The buffer is padded to whole tiles, so no mask.
            exp_ptrs = exp_ptr + rows.to(tl.int64)[:, None] * exp_stride + half_cols[None, :]
            tl.store(exp_ptrs, exps.to(exp_ptr.dtype.element_ty))


@triton.jit
def tile_shift(z, row_shift, HAS_ROW_SHIFT: tl.constexpr, SHIFT_SLACK: tl.constexpr):
    """What exponentials of these columns are taken on: their largest logit, or the row's shift."""
    shift = tl.max(z, axis=1)
    if HAS_ROW_SHIFT:
        # Keeping the row's shift keeps its tiles on one scale; the slack bounds how far exp may exceed 1.
        shift = tl.where(shift <= row_shift + SHIFT_SLACK, row_shift, shift)
    return shift


class RowScores(NamedTuple):
    """What one product tells of each row."""

    logps_T: torch.Tensor
    """fp32 log-prob of the label, 0 where ignored."""
    lse_T: torch.Tensor
    """fp64 log-sum-exp: near 1e4 fp32 is too coarse to give softmax = exp(z - lse) back."""
    label_logit_T: torch.Tensor
    """fp32 logit of the label; anything where it is ignored or no class."""
    tile_shift_JT: torch.Tensor
    """fp32 shift of each `width` columns: all of them with `exps`, else of the last slice."""
    width: int
    token_stats_KT: torch.Tensor | None = None
    """fp32, in the order of `token_stats.TOKEN_STATS`, when asked for."""
    mass_TC: torch.Tensor | None = None
    """fp32 probability of tiles of `mass_columns` columns without the label's own, when asked for."""


def empty_exps(hidden_TD: torch.Tensor, V: int) -> torch.Tensor:
    """Room for exponentials (see `tile_partials`), padded to whole tiles; its first T rows and V columns count."""
    rows = triton.cdiv(hidden_TD.shape[0], MAX_BLOCK) * MAX_BLOCK
    return torch.empty(rows, triton.cdiv(V, MAX_BLOCK) * MAX_BLOCK, dtype=hidden_TD.dtype, device=hidden_TD.device)


def check_whole_tiles(buffer: torch.Tensor, config: TileConfig, T: int, V: int) -> None:
    """Kernels write whole tiles, without a mask."""
    rows, columns = triton.cdiv(T, config.block_n) * config.block_n, triton.cdiv(V, config.block_v) * config.block_v
    assert buffer.stride(1) == 1
    assert buffer.shape[0] >= rows, (buffer.shape, rows)
    assert buffer.shape[1] >= columns, (buffer.shape, columns)


def partial_width(tile: TileLaunch, *, joined: bool) -> int:
    """Columns that share a partial: of a tile that is taken in halves each has its own, unless `joined`."""
    return tile.config.block_v if joined or not tile.meta["SPLIT"] else tile.config.block_v // 2


def tile_partials(
    hidden_TD: torch.Tensor,
    head: Head,
    labels_T: torch.Tensor,
    label_logit_T: torch.Tensor,
    *,
    first_col: int = 0,
    exps: torch.Tensor | None = None,
    row_shift_T: torch.Tensor | None = None,
    token_stats: bool = False,
    config: TileConfig | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> TilePartials:
    """Partials of a slice of the vocabulary, which begins at column `first_col`; `head` is the slice's own.

    Fills label_logit_T where the label is one of these columns, and `exps` (from `empty_exps`) with
    exp(z - shift) * dz/dbiased / (logit_scale / temperature), 0 at the label. With row_shift_T a tile keeps the row's
    shift unless it would overflow.
    With `token_stats` the result holds their partials, too. `out` is where shifts and sums go, [J, T] each.
    """
    (T, D), V = hidden_TD.shape, head.weight_VD.shape[0]
    kernel = "linear_stats" if exps is None else "linear_exps"
    heavy = token_stats or head.softcap is not None
    tile = TileLaunch(kernel, hidden_TD, head.weight_VD, heavy=heavy, config=config)
    if exps is not None:
        check_whole_tiles(exps, tile.config, T, V)
    # Less to hold beside exponentials; without them a filter wants narrow tiles, and the same numbers as without one.
    joined = exps is not None and not token_stats
    width = partial_width(tile, joined=joined)
    # Whole tiles, so that the second half of the last one, which may lie past V, has its place too.
    num_tiles = triton.cdiv(V, tile.config.block_v) * (tile.config.block_v // width)
    if out is None:
        shift_JT = torch.empty((num_tiles, T), dtype=torch.float32, device=hidden_TD.device)
        sum_JT = torch.empty_like(shift_JT)
    else:
        shift_JT, sum_JT = out
    assert shift_JT.shape == sum_JT.shape == (num_tiles, T)
    # exp(10) is below the largest float16, 6.6e4; exp(24) is no more than fp32 sums take without loss.
    shift_slack = 10.0 if hidden_TD.dtype == torch.float16 else 24.0
    if tile.by_hopper and not heavy:
        hopper.launch(
            hopper.STATS if exps is None else hopper.EXPS,
            hidden_TD,
            head,
            labels_T,
            first_col=first_col,
            ignore_index=-1,
            group=tile.config.group_n,
            shift_slack=shift_slack,
            out=exps,
            row_shift=row_shift_T,
            tile_shift=shift_JT,
            tile_sum=sum_JT,
            label_logit=label_logit_T,
        )
        return TilePartials(shift_JT, sum_JT, width)
    partials_5JT = shift_JT.new_empty(NUM_PARTIALS, *shift_JT.shape) if token_stats else None
    with on_device(hidden_TD.device):
        linear_stats_fwd_kernel[(tile.num_programs,)](
            tile.hidden,
            tile.weight,
            head.bias_V,
            labels_T,
            row_shift_T,
            shift_JT,
            sum_JT,
            label_logit_T,
            exps,
            partials_5JT,
            *tile.strides,
            0 if exps is None else exps.stride(0),
            shift_JT.numel(),
            first_col,
            T,
            V,
            D,
            **epilogue_arguments(head),
            HAS_ROW_SHIFT=row_shift_T is not None,
            WRITE_EXP=exps is not None,
            TOKEN_STATS=token_stats,
            JOINED=joined,
            SHIFT_SLACK=shift_slack,
            **tile.meta,
        )
    return TilePartials(shift_JT, sum_JT, width, partials_5JT)


def score_rows(
    hidden_TD: torch.Tensor,
    head: Head,
    labels_T: torch.Tensor,
    *,
    ignore_index: int,
    exps: torch.Tensor | None = None,
    token_stats: bool = False,
    mass_columns: int | None = None,
    config: TileConfig | None = None,
) -> RowScores:
    """Log-probs and log-sum-exps of T > 0 rows over the whole vocabulary.

    `exps` and `token_stats` are as in `tile_partials`.
    With `mass_columns` also the mass of each row's tiles of as many columns.
    A label outside [0, V) that is not ignored gives NaN and reads nothing.
    Workspace: PARTIAL_BYTES; with `exps` or `mass_columns` the shifts and sums of all tiles, too.
    """
    T, V = hidden_TD.shape[0], head.weight_VD.shape[0]
    heavy = token_stats or head.softcap is not None
    kernel = "linear_stats" if exps is None else "linear_exps"
    tile = TileLaunch(kernel, hidden_TD, head.weight_VD, heavy=heavy, config=config)
    state = RowState.empty(hidden_TD, token_stats=token_stats)
    width = partial_width(tile, joined=exps is not None and not token_stats)
    columns = V if exps is not None else stats_columns(T, width, token_stats=token_stats)
    whole = None
    if mass_columns is not None:
        num_tiles = triton.cdiv(V, tile.config.block_v) * (tile.config.block_v // width)
        whole = torch.empty(2, num_tiles, T, dtype=torch.float32, device=hidden_TD.device)
    for start in range(0, V, columns):
        tiles = slice(start // width, (start + columns) // width)
        partials = tile_partials(
            hidden_TD,
            head.columns(slice(start, start + columns)),
            labels_T,
            state.label_logit_T,
            first_col=start,
            exps=exps,
            token_stats=token_stats,
            config=tile.config,
            out=None if whole is None else (whole[0, tiles], whole[1, tiles]),
        )
        if start + columns < V:
            merge_partials(partials, state, first=start == 0)
            # Given back before the next ones are asked for.
            del partials
    merge_tokens(partials, state, first=start == 0)
    logps_T, lse_T = finish_rows(partials, state, labels_T, V=V, ignore_index=ignore_index, first=start == 0)
    token_stats_KT = None
    if state.token_stats_7T is not None:
        rows = (labels_T, state.label_logit_T, logps_T, lse_T)
        token_stats_KT = finish_token_stats(state.token_stats_7T, *rows, V=V, ignore_index=ignore_index)
    mass_TC = None
    if whole is not None and mass_columns is not None:
        mass_TC = tile_mass(whole[0], whole[1], lse_T, width=width, columns=mass_columns, V=V)
    return RowScores(logps_T, lse_T, state.label_logit_T, partials.shift_JT, width, token_stats_KT, mass_TC)


def stats_columns(T: int, width: int, *, token_stats: bool) -> int:
    """Columns of a slice, in whole tiles, whose partials of `width` columns take PARTIAL_BYTES."""
    tile_bytes = T * 4 * (2 + NUM_PARTIALS if token_stats else 2)
    return max(1, PARTIAL_BYTES // tile_bytes * width // MAX_BLOCK) * MAX_BLOCK
