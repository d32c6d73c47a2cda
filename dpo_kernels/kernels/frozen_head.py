"""Log-probs and their gradient with respect to hidden states in two products over the head (2G): for a frozen head.

Legend: T rows, D hidden size, V vocabulary, v columns of a slice, J column tiles.
d logp / d hidden = sum_j (1[j = label] - p_j) dz_j/dbiased W_j is a softmax-weighted sum over the vocabulary, so it is
formed as attention is: slice by slice, on a running shift per row. One product gives the exponentials of a slice, the
other sums W with them. Any upstream gradient per row is applied later, to the row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dpo_kernels.head import Head
from dpo_kernels.kernels.launch import COMPILATION, final_scalars, on_device
from dpo_kernels.kernels.logits_tile import linear_slope, logits_slope, one_minus_exp
from dpo_kernels.kernels.products import add_product_
from dpo_kernels.kernels.row_state import RowState, TilePartials, finish_rows, merge_partials
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_logps import empty_exps, tile_partials
from dpo_kernels.kernels.token_stats import finish_token_stats

ROWS = 4


@triton.jit(do_not_specialize=["tile_shift_ptr", "row_shift_ptr", "T", "num_tiles"])
def align_exps_kernel(
    exp_ptr,
    tile_shift_ptr,
    row_shift_ptr,
    exp_stride,
    T,
    V,
    num_tiles,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Bring tiles that chose a shift of their own onto the row's. Most did not, and are not read."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row_mask = rows < T
    mask = row_mask[:, None] & (tiles < num_tiles)[None, :]
    row_shift = tl.load(row_shift_ptr + rows, mask=row_mask, other=0.0)
    partial = tiles.to(tl.int64)[None, :] * T + rows[:, None]
    tile_shift = tl.load(tile_shift_ptr + partial, mask=mask, other=0.0)
    # A tile without finite logits holds zeros, whatever its shift.
    moved = mask & (tile_shift != row_shift[:, None]) & (tile_shift != float("-inf"))
    if tl.max(moved.to(tl.int32)) > 0:
        factor = tl.exp(tl.where(moved, tile_shift - row_shift[:, None], 0.0))
        cols = tiles[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        exp_ptrs = exp_ptr + rows.to(tl.int64)[:, None, None] * exp_stride + cols[None, :, :]
        inside = moved[:, :, None] & (cols < V)[None, :, :]
        exps = tl.load(exp_ptrs, mask=inside, other=0.0).to(tl.float32) * factor[:, :, None]
        tl.store(exp_ptrs, exps.to(exp_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["old_shift_ptr", "new_shift_ptr", "T"])
def rescale_rows_kernel(
    acc_ptr, old_shift_ptr, new_shift_ptr, acc_stride, T, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """acc *= exp(old shift - new shift); rows whose shift stayed are not read."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    old = tl.load(old_shift_ptr + rows, mask=rows < T, other=0.0)
    new = tl.load(new_shift_ptr + rows, mask=rows < T, other=0.0)
    moved = (old != new) & (old != float("-inf"))
    if tl.max(moved.to(tl.int32)) > 0:
        factor = tl.exp(tl.where(moved, old - new, 0.0))
        row_ptrs = acc_ptr + rows.to(tl.int64) * acc_stride
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            mask = moved[:, None] & (dims < D)[None, :]
            values = tl.load(row_ptrs[:, None] + dims[None, :], mask=mask, other=0.0)
            tl.store(row_ptrs[:, None] + dims[None, :], values * factor[:, None], mask=mask)


@triton.jit(do_not_specialize=["labels_ptr", "label_logit_ptr", "logps_ptr", "lse_ptr", "row_shift_ptr", "T"])
def finish_dx_kernel(
    acc_ptr,
    weight_ptr,
    dx_ptr,
    labels_ptr,
    label_logit_ptr,
    logps_ptr,
    lse_ptr,
    row_shift_ptr,
    acc_stride,
    weight_stride,
    dx_stride,
    ignore_index,
    T,
    V,
    D,
    logit_scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx = (1 - p[label]) dz/dbiased W[label] - (logit_scale / temperature) exp(shift - lse) acc, 0 on ignored rows."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    labels = tl.load(labels_ptr + rows, mask=rows < T, other=ignore_index)
    used = labels != ignore_index
    logps = tl.load(logps_ptr + rows, mask=used, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=used, other=0.0)
    shift = tl.load(row_shift_ptr + rows, mask=used, other=0.0)
    label_logit = tl.load(label_logit_ptr + rows, mask=used, other=0.0)
    label_factor = one_minus_exp(logps) * logits_slope(label_logit, logit_scale, softcap, temperature, HAS_SOFTCAP)
    acc_factor = linear_slope(logit_scale, temperature) * tl.exp((shift - lse).to(tl.float32))
    # The log-prob of a label outside the vocabulary is NaN already; whichever row is read for it does not matter.
    weight_rows = tl.minimum(tl.maximum(labels, 0), V - 1).to(tl.int64)
    rows = rows.to(tl.int64)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        mask = (rows < T)[:, None] & (dims < D)[None, :]
        read = mask & used[:, None]
        acc = tl.load(acc_ptr + rows[:, None] * acc_stride + dims[None, :], mask=read, other=0.0)
        weight = tl.load(weight_ptr + weight_rows[:, None] * weight_stride + dims[None, :], mask=read, other=0.0)
        dx = label_factor[:, None] * weight.to(tl.float32) - acc_factor[:, None] * acc
        dx = tl.where(used[:, None], dx, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * dx_stride + dims[None, :], dx, mask=mask)


class FrozenHead(NamedTuple):
    """fp32 log-probs, fp64 log-sum-exps, and d logps / d hidden in the dtype of hidden, 0 on ignored rows."""

    logps_T: torch.Tensor
    lse_T: torch.Tensor
    dx_TD: torch.Tensor
    token_stats_KT: torch.Tensor | None = None
    """fp32, in the order of `token_stats.TOKEN_STATS`, when asked for."""


def frozen_head(
    hidden_TD: torch.Tensor,
    head: Head,
    labels_T: torch.Tensor,
    *,
    slice_columns: int,
    ignore_index: int,
    token_stats: bool = False,
    config: TileConfig | None = None,
) -> FrozenHead:
    """Forward over slices of `slice_columns` of the vocabulary; T > 0.

    Workspace: one slice with the partials of its tiles, and T x D in fp32.
    """
    (T, D), V = hidden_TD.shape, head.weight_VD.shape[0]
    exps = empty_exps(hidden_TD, min(V, slice_columns))
    acc_TD = torch.empty(T, D, dtype=torch.float32, device=hidden_TD.device)
    state = RowState.empty(hidden_TD, token_stats=token_stats)
    for start in range(0, V, slice_columns):
        part = head.columns(slice(start, start + slice_columns))
        first = start == 0
        partials = tile_partials(
            hidden_TD,
            part,
            labels_T,
            state.label_logit_T,
            first_col=start,
            exps=exps,
            row_shift_T=None if first else state.shift_T,
            token_stats=token_stats,
            config=config,
        )
        old_shift_T = state.shift_T.clone()
        merge_partials(partials, state, first=first)
        _align_exps(exps, partials, state.shift_T, part.weight_VD.shape[0])
        if not first:
            with on_device(acc_TD.device):
                rescale_rows_kernel[(triton.cdiv(T, ROWS),)](
                    acc_TD, old_shift_T, state.shift_T, acc_TD.stride(0), T, D, BLOCK_N=ROWS, BLOCK_D=512, **COMPILATION
                )
        # Given back before the next ones are asked for.
        del partials
        add_product_(acc_TD, exps[:T, : part.weight_VD.shape[0]], part.weight_VD, first=first)
    none_left = TilePartials(acc_TD.new_empty(0, T), acc_TD.new_empty(0, T), width=0)
    logps_T, lse_T = finish_rows(none_left, state, labels_T, V=V, ignore_index=ignore_index, first=False)
    token_stats_KT = None
    if state.token_stats_7T is not None:
        rows = (labels_T, state.label_logit_T, logps_T, lse_T)
        token_stats_KT = finish_token_stats(state.token_stats_7T, *rows, V=V, ignore_index=ignore_index)
    dx_TD = torch.empty(T, D, dtype=hidden_TD.dtype, device=hidden_TD.device)
    with on_device(acc_TD.device):
        finish_dx_kernel[(triton.cdiv(T, ROWS),)](
            acc_TD,
            head.weight_VD,
            dx_TD,
            labels_T,
            state.label_logit_T,
            logps_T,
            lse_T,
            state.shift_T,
            acc_TD.stride(0),
            head.weight_VD.stride(0),
            dx_TD.stride(0),
            ignore_index,
            T,
            V,
            D,
            **final_scalars(head),
            BLOCK_N=ROWS,
            BLOCK_D=512,
            **COMPILATION,
        )
    return FrozenHead(logps_T, lse_T, dx_TD, token_stats_KT)


def _align_exps(exps: torch.Tensor, partials: TilePartials, row_shift_T: torch.Tensor, V: int) -> None:
    T = row_shift_T.shape[0]
    num_tiles = triton.cdiv(V, partials.width)
    block_n, block_t = 8, 512 // partials.width
    with on_device(exps.device):
        align_exps_kernel[(triton.cdiv(T, block_n), triton.cdiv(num_tiles, block_t))](
            exps,
            partials.shift_JT,
            row_shift_T,
            exps.stride(0),
            T,
            V,
            num_tiles,
            WIDTH=partials.width,
            BLOCK_N=block_n,
            BLOCK_J=block_t,
            num_warps=4,
            **COMPILATION,
        )
