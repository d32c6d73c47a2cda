"""Gradient of label log-probs with respect to the biased products of a vocabulary slice, recomputed from hidden states.

Legend: T rows, D hidden size, V columns of the slice. One product over the slice, its tiles turned to
g * (onehot - exp(z - lse)) * dz/dbiased from the fp32 accumulators and written once in the compute dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpo_kernels.head import Head
from dpo_kernels.kernels import hopper
from dpo_kernels.kernels.filtered_products import TileLists
from dpo_kernels.kernels.launch import TileLaunch, epilogue_arguments, on_device
from dpo_kernels.kernels.logits_tile import (
    LOG2_E,
    bias_tile,
    cap_slope_of,
    final_logits,
    linear_slope,
    local_labels,
    tile_position,
    tile_product,
)
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_logps import check_whole_tiles


@triton.jit(do_not_specialize=["labels_ptr", "lse_ptr", "grad_ptr", "first_col", "T"])
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
    T,
    V,
    D,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
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
    tile_n, tile_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_N), num_tiles_v, GROUP_N)
    row_start = tile_n * BLOCK_N
    col_start = tile_v * BLOCK_V
    if FILTERED:
        kept_ptrs = kept_ptr + (row_start // FILTER_ROWS).to(tl.int64) * kept_stride
        if tl.load(kept_ptrs + (first_col + col_start) // FILTER_COLUMNS) == 0:
            return
    rows = row_start + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    # What belongs to rows is loaded ahead of the product, which hides how long that takes.
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
    used = labels != ignore_index
    label_cols = local_labels(labels, first_col)
    grad = tl.load(grad_ptr + rows, mask=used, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=used, other=0.0)
    # Two fp32 numbers carry what fp64 holds: z - high is exact where it matters.
    high = lse.to(tl.float32)
    low = (lse - high).to(tl.float32) * LOG2_E
    owns_label = (label_cols >= col_start) & (label_cols < tl.minimum(col_start + BLOCK_V, V))
    # Most tiles hold no row's label and no ignored row, and end before V: they skip what is for those.
    unusual = owns_label | (row_mask & (used == 0))
    special = (col_start + BLOCK_V > V) | (tl.max(unusual.to(tl.int32), axis=0) > 0)
    cols = col_start + tl.arange(0, BLOCK_V)
    acc = bias_tile(bias_ptr, cols, V, BLOCK_N, BLOCK_V, HAS_BIAS)
    acc = tile_product(
        acc, hidden, weight, hidden_stride, weight_stride, row_start, col_start, T, V, D,
        BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
    )  # fmt: skip
    # Wide tiles in halves: a whole one beside its gradient would spill registers.
    HALVES: tl.constexpr = 2 if SPLIT else 1
    HALF: tl.constexpr = BLOCK_V // HALVES
    if SPLIT:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, HALF)), (0, 2, 1)))
    else:
        left = acc
    for half in tl.static_range(HALVES):
        biased = left if half == 0 else right
        z = final_logits(biased, logit_scale, softcap, temperature, HAS_SOFTCAP, HAS_SCALE)
        factor = (grad * linear_slope(logit_scale, temperature))[:, None]
        if HAS_SOFTCAP:
            factor = factor * cap_slope_of(biased, logit_scale, softcap)
        p = tl.exp2((z - high[:, None]) * LOG2_E - low[:, None])
        half_cols = col_start + half * HALF + tl.arange(0, HALF)
        gradient = -p * factor
        if special:
            is_label = half_cols[None, :] == label_cols[:, None]
            gradient = tl.where(is_label, (1.0 - p) * factor, gradient)
            # An ignored row is 0 even where its hidden state is not finite, and so are columns beyond the last.
            gradient = tl.where(used[:, None] & (half_cols < V)[None, :], gradient, 0.0)
        # The buffer is padded to whole tiles, so no mask.
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_stride + half_cols[None, :]
        tl.store(out_ptrs, gradient.to(out_ptr.dtype.element_ty))


def slice_grad(
    hidden_TD: torch.Tensor,
    head: Head,
    labels_T: torch.Tensor,
    lse_T: torch.Tensor,
    grad_T: torch.Tensor,
    out_TV: torch.Tensor,
    *,
    first_col: int,
    ignore_index: int,
    lists: TileLists | None = None,
    config: TileConfig | None = None,
) -> None:
    """Fill out_TV with d(sum grad * logps)/dbiased for a slice of the vocabulary that begins at column `first_col`.

    out_TV is a buffer of whole tiles (`empty_exps`), whose first T rows and V columns count; columns of the last tile
    past V get 0. lse_T is fp64 (or fp32), grad_T fp32; `head` is the slice's own. Ignored rows get exactly 0.
    With `lists` only tiles that these keep are computed and written.
    """
    (T, D), V = hidden_TD.shape, head.weight_VD.shape[0]
    kernel = "slice_grad" if lists is None else "filtered_grad"
    tile = TileLaunch(kernel, hidden_TD, head.weight_VD, heavy=head.softcap is not None, config=config)
    num_programs = tile.num_programs
    check_whole_tiles(out_TV, tile.config, T, V)
    if lists is None and tile.by_hopper and head.softcap is None:
        hopper.launch(
            hopper.GRADIENT,
            hidden_TD,
            head,
            labels_T,
            first_col=first_col,
            ignore_index=ignore_index,
            group=tile.config.group_n,
            out=out_TV,
            lse=lse_T.double().contiguous(),
            grad=grad_T.contiguous(),
        )
        return
    if lists is not None:
        assert lists.rows % tile.config.block_n == 0 == lists.columns % tile.config.block_v
        whole_columns = triton.cdiv(V, lists.columns) * lists.columns
        num_programs = triton.cdiv(T, tile.config.block_n) * (whole_columns // tile.config.block_v)
    with on_device(hidden_TD.device):
        slice_grad_kernel[(num_programs,)](
            tile.hidden,
            tile.weight,
            head.bias_V,
            labels_T,
            lse_T,
            grad_T,
            out_TV,
            None if lists is None else lists.kept_BC,
            *tile.strides,
            out_TV.stride(0),
            0 if lists is None else lists.kept_BC.stride(0),
            first_col,
            ignore_index,
            T,
            V,
            D,
            **epilogue_arguments(head),
            FILTERED=lists is not None,
            FILTER_ROWS=1 if lists is None else lists.rows,
            FILTER_COLUMNS=1 if lists is None else lists.columns,
            **tile.meta,
        )
