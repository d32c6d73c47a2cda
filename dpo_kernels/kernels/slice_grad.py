"""Gradient of label log-probs with respect to the biased products of a vocabulary slice, recomputed from hidden states.

Legend: N rows, D hidden size, V columns of the slice. One product over the slice, its tiles turned to
g * (onehot - exp(z - lse)) * dz/dbiased from the fp32 accumulators and written once in the compute dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.filtered_products import TileLists
from dpo_kernels.kernels.launch import HeadOptions, TileLaunch, on_device
from dpo_kernels.kernels.logits_tile import (
    bias_tile,
    cap_slope_of,
    final_logits,
    linear_slope,
    tile_position,
    tile_product,
)
from dpo_kernels.kernels.tile_config import TileConfig


@triton.jit(do_not_specialize=["labels_ptr", "lse_ptr", "grad_ptr", "first_col", "N"])
def slice_grad_kernel(
    hidden,
    weight,
    bias_ptr,
    labels_ptr,
    lse_ptr,
    grad_ptr,
    out_ptr,
    kept_ptr,
    hidden_stride,
    weight_stride,
    out_stride,
    kept_stride,
    first_col,
    ignore_index,
    N,
    V,
    D,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FILTERED: tl.constexpr,
    FILTER_ROWS: tl.constexpr,
    FILTER_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    if FILTERED:
        num_tiles_v = tl.cdiv(V, FILTER_COLUMNS) * (FILTER_COLUMNS // BLOCK_V)
    else:
        num_tiles_v = tl.cdiv(V, BLOCK_V)
    tile_n, tile_v = tile_position(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_tiles_v, GROUP_N)
    row_start = tile_n * BLOCK_N
    col_start = tile_v * BLOCK_V
    if FILTERED:
        kept_ptrs = kept_ptr + (row_start // FILTER_ROWS).to(tl.int64) * kept_stride
        if tl.load(kept_ptrs + (first_col + col_start) // FILTER_COLUMNS) == 0:
            return
    rows = row_start + tl.arange(0, BLOCK_N)
    acc = bias_tile(bias_ptr, col_start + tl.arange(0, BLOCK_V), V, BLOCK_N, BLOCK_V, HAS_BIAS)
    acc = tile_product(
        acc, hidden, weight, hidden_stride, weight_stride, row_start, col_start, N, V, D,
        BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
    )  # fmt: skip
    # Wide tiles in halves: a whole one beside its gradient would spill registers.
    if SPLIT:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))
    else:
        left = acc
    for half in tl.static_range(2 if SPLIT else 1):
        _write_gradient(
            left if half == 0 else right, rows, col_start + half * (BLOCK_V // 2), labels_ptr, lse_ptr, grad_ptr,
            out_ptr, out_stride, first_col, ignore_index, N, V, logit_scale, softcap, temperature, HAS_SOFTCAP,
            FILTERED, BLOCK_V // 2 if SPLIT else BLOCK_V,
        )  # fmt: skip


@triton.jit
def _write_gradient(
    biased,
    rows,
    col_start,
    labels_ptr,
    lse_ptr,
    grad_ptr,
    out_ptr,
    out_stride,
    first_col,
    ignore_index,
    N,
    V,
    logit_scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of WIDTH columns from col_start on."""
    row_mask = rows < N
    cols = col_start + tl.arange(0, WIDTH)
    z = final_logits(biased, logit_scale, softcap, temperature, HAS_SOFTCAP)
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
    used = labels != ignore_index
    grad = tl.load(grad_ptr + rows, mask=used, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=used, other=0.0)
    # Two fp32 numbers carry what fp64 holds: z - high is exact where it matters.
    high = lse.to(tl.float32)
    low = (lse - high).to(tl.float32)
    local = labels - first_col
    owns_label = (local >= col_start) & (local < col_start + WIDTH)
    is_label = cols[None, :] == tl.where(owns_label, local, -1).to(tl.int32)[:, None]
    slope = linear_slope(logit_scale, temperature)
    if HAS_SOFTCAP:
        slope = slope * cap_slope_of(biased, logit_scale, softcap)
    p = tl.exp((z - high[:, None]) - low[:, None])
    gradient = tl.where(is_label, 1.0 - p, -p) * slope * grad[:, None]
    # An ignored row is 0 even where its hidden state is not finite.
    gradient = tl.where(used[:, None], gradient, 0.0)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    inside = (cols < V)[None, :]
    if WHOLE_TILES:
        # Products over whole tiles need zeros beyond the last column.
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(out_ptrs, gradient.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
    else:
        tl.store(out_ptrs, gradient.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & inside)


def slice_grad(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    out_NV: torch.Tensor,
    *,
    first_col: int,
    ignore_index: int,
    options: HeadOptions,
    lists: TileLists | None = None,
    config: TileConfig | None = None,
) -> None:
    """Fill out_NV with d(sum grad * logps)/dbiased for the slice weight_VD that begins at column `first_col`.

    lse_N is fp64 (or fp32), grad_N fp32; options.bias_V is the slice's own. Ignored rows get exactly 0. With `lists`
    only tiles that these keep are computed and written, whole ones: rows of out_NV must reach to the end of a tile.
    """
    N, D = hidden_ND.shape
    V = weight_VD.shape[0]
    kernel = "slice_grad" if lists is None else "filtered_grad"
    tile = TileLaunch(kernel, hidden_ND, weight_VD, heavy=options.softcap is not None, config=config)
    num_programs = tile.num_programs
    if lists is not None:
        assert lists.rows % tile.config.block_n == 0 == lists.columns % tile.config.block_v
        whole_columns = triton.cdiv(V, lists.columns) * lists.columns
        num_programs = triton.cdiv(N, tile.config.block_n) * (whole_columns // tile.config.block_v)
    with on_device(hidden_ND.device):
        slice_grad_kernel[(num_programs,)](
            tile.hidden,
            tile.weight,
            options.bias_V,
            labels_N,
            lse_N,
            grad_N,
            out_NV,
            None if lists is None else lists.kept_BC,
            *tile.strides,
            out_NV.stride(0),
            0 if lists is None else lists.kept_BC.stride(0),
            first_col,
            ignore_index,
            N,
            V,
            D,
            **options.kernel_arguments(),
            FILTERED=lists is not None,
            FILTER_ROWS=1 if lists is None else lists.rows,
            FILTER_COLUMNS=1 if lists is None else lists.columns,
            **tile.meta,
        )
