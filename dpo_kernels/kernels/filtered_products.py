"""Gradients of hidden states, weight and bias from those tiles of a logits gradient that a filter keeps.

Legend: T rows, D hidden size, V columns of a vocabulary slice, B row blocks and C column tiles of the filter. The
gradient of the logits of a slice lies in a buffer of which only kept tiles were written; the others are never read.
Each program owns a tile of its result and adds the kept tiles up in their order: no atomics, and two runs are bitwise
equal. Lists of kept tiles are made on the device, so nothing waits for their lengths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_kernels.kernels.launch import COMPILATION, on_device, precision, table_config, tma_ready
from dpo_kernels.kernels.logits_tile import dot, tile_position
from dpo_kernels.kernels.tile_config import TileConfig


@triton.jit(do_not_specialize=["first_tile", "last_tile", "T"])
def filtered_dx_kernel(
    grad,
    weight,
    dx_ptr,
    tiles_ptr,
    tile_ends_ptr,
    grad_stride,
    weight_stride,
    dx_stride,
    first_tile,
    last_tile,
    num_tiles,
    T,
    V,
    D,
    FIRST: tl.constexpr,
    FILTER_ROWS: tl.constexpr,
    FILTER_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX [BLOCK_N, BLOCK_D] += gradient @ weight over the kept tiles of these rows, BLOCK_V columns a step."""
    tile_n, tile_d = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_N), tl.cdiv(D, BLOCK_D), GROUP_N)
    row_start = tile_n * BLOCK_N
    block = row_start // FILTER_ROWS
    ends_ptr = tile_ends_ptr + block.to(tl.int64) * (num_tiles + 1)
    begin = tl.load(ends_ptr + first_tile)
    end = tl.load(ends_ptr + last_tile)
    tiles_ptr += block.to(tl.int64) * num_tiles
    rows = row_start + tl.arange(0, BLOCK_N)
    dims = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    dx_ptrs = dx_ptr + rows.to(tl.int64)[:, None] * dx_stride + dims[None, :]
    inside = (rows < T)[:, None] & (dims < D)[None, :]
    if FIRST:
        acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    else:
        if begin == end:
            return
        acc = tl.load(dx_ptrs, mask=inside, other=0.0)
    STEPS: tl.constexpr = FILTER_COLUMNS // BLOCK_V
    # Rows past the end read the last one: what they add up is not stored.
    safe_rows = tl.minimum(rows, T - 1).to(tl.int64)
    for step in range(begin * STEPS, end * STEPS):
        tile = tl.load(tiles_ptr + step // STEPS) - first_tile
        col_start = tile * FILTER_COLUMNS + (step % STEPS) * BLOCK_V
        if USE_TMA:
            grad_tile = grad.load([row_start, col_start])
            weight_tile = weight.load([col_start, tile_d * BLOCK_D])
        else:
            cols = col_start + tl.arange(0, BLOCK_V)
            grad_tile = tl.load(grad + safe_rows[:, None] * grad_stride + cols[None, :])
            weight_tile = tl.load(
                weight + cols.to(tl.int64)[:, None] * weight_stride + dims[None, :],
                mask=(cols < V)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
        acc = dot(grad_tile, weight_tile, acc, PRECISION)
    tl.store(dx_ptrs, acc, mask=inside)


@triton.jit(do_not_specialize=["first_tile", "num_blocks", "T"])
def filtered_dw_kernel(
    grad,
    hidden,
    dw_ptr,
    blocks_ptr,
    counts_ptr,
    grad_stride,
    hidden_stride,
    dw_row_stride,
    dw_col_stride,
    first_tile,
    num_blocks,
    T,
    V,
    D,
    ACCUMULATE: tl.constexpr,
    FILTER_ROWS: tl.constexpr,
    FILTER_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW [BLOCK_V, BLOCK_D] = gradient.T @ hidden over the row blocks that keep these columns, BLOCK_N rows a step."""
    tile_v, tile_d = tile_position(tl.program_id(0), tl.cdiv(V, BLOCK_V), tl.cdiv(D, BLOCK_D), GROUP_N)
    col_start = tile_v * BLOCK_V
    tile = first_tile + col_start // FILTER_COLUMNS
    count = tl.load(counts_ptr + tile)
    blocks_ptr += tile.to(tl.int64) * num_blocks
    cols = col_start + tl.arange(0, BLOCK_V)
    dims = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    STEPS: tl.constexpr = FILTER_ROWS // BLOCK_N
    for step in range(0, count * STEPS):
        block = tl.load(blocks_ptr + step // STEPS)
        row_start = block * FILTER_ROWS + (step % STEPS) * BLOCK_N
        if USE_TMA:
            grad_tile = grad.load([row_start, col_start])
            hidden_tile = hidden.load([row_start, tile_d * BLOCK_D])
        else:
            rows = row_start + tl.arange(0, BLOCK_N)
            grad_tile = tl.load(
                grad + rows.to(tl.int64)[:, None] * grad_stride + cols[None, :], mask=(rows < T)[:, None], other=0.0
            )
            hidden_tile = tl.load(
                hidden + rows.to(tl.int64)[:, None] * hidden_stride + dims[None, :],
                mask=(rows < T)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
        acc = dot(grad_tile.T, hidden_tile, acc, PRECISION)
    dw_ptrs = dw_ptr + cols.to(tl.int64)[:, None] * dw_row_stride + dims.to(tl.int64)[None, :] * dw_col_stride
    inside = (cols < V)[:, None] & (dims < D)[None, :]
    if ACCUMULATE:
        acc += tl.load(dw_ptrs, mask=inside, other=0.0)
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_tile", "num_blocks", "T"])
def filtered_db_kernel(
    grad_ptr,
    db_ptr,
    blocks_ptr,
    counts_ptr,
    grad_stride,
    first_tile,
    num_blocks,
    T,
    V,
    FILTER_ROWS: tl.constexpr,
    FILTER_COLUMNS: tl.constexpr,
):
    """Column sums of the kept row blocks of one tile."""
    tile = first_tile + tl.program_id(0)
    blocks_ptr += tile.to(tl.int64) * num_blocks
    cols = tl.program_id(0) * FILTER_COLUMNS + tl.arange(0, FILTER_COLUMNS)
    total = tl.zeros((FILTER_COLUMNS,), dtype=tl.float32)
    for i in range(0, tl.load(counts_ptr + tile)):
        rows = tl.load(blocks_ptr + i) * FILTER_ROWS + tl.arange(0, FILTER_ROWS)
        grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * grad_stride + cols[None, :]
        total += tl.sum(tl.load(grad_ptrs, mask=(rows < T)[:, None], other=0.0).to(tl.float32), axis=0)
    tl.store(db_ptr + cols, total.to(db_ptr.dtype.element_ty), mask=cols < V)


class TileLists(NamedTuple):
    """Kept tiles of a [T, V] matrix, listed both ways; int32."""

    rows: int
    columns: int
    kept_BC: torch.Tensor
    """int8: 1 where kept."""
    tiles_BC: torch.Tensor
    """Column tiles of each row block, the kept ones first, in their order."""
    tile_ends_BC: torch.Tensor
    """[B, C + 1]: how many of the tiles before this one are kept."""
    blocks_CB: torch.Tensor
    """Row blocks of each column tile, the kept ones first, in their order."""
    counts_C: torch.Tensor
    """How many those are."""

    @classmethod
    def make(cls, kept_BC: torch.Tensor, *, rows: int, columns: int) -> TileLists:
        kept_BC = kept_BC.to(torch.int8)
        ends = kept_BC.cumsum(dim=1, dtype=torch.int32)
        return cls(
            rows,
            columns,
            kept_BC,
            kept_BC.argsort(dim=1, descending=True, stable=True).int(),
            torch.nn.functional.pad(ends, (1, 0)),
            kept_BC.T.contiguous().argsort(dim=1, descending=True, stable=True).int(),
            kept_BC.sum(dim=0, dtype=torch.int32),
        )


def add_filtered_dx_(
    dX_TD: torch.Tensor,
    grad_TV: torch.Tensor,
    weight_VD: torch.Tensor,
    lists: TileLists,
    *,
    first_col: int,
    config: TileConfig | None = None,
) -> None:
    """dX_TD, contiguous fp32, += grad_TV @ weight_VD over kept tiles; = for the first slice.

    grad_TV is a slice of the vocabulary that begins at `first_col`, the part below V of rows of whole tiles that are 0
    beyond it.
    """
    (T, V), D = grad_TV.shape, weight_VD.shape[1]
    config, grad, weight, meta = _launch("filtered_dx", grad_TV, weight_VD, "block_v", lists, config)
    first_tile = first_col // lists.columns
    with on_device(dX_TD.device):
        filtered_dx_kernel[(triton.cdiv(T, config.block_n) * triton.cdiv(D, config.block_d),)](
            grad,
            weight,
            dX_TD,
            lists.tiles_BC,
            lists.tile_ends_BC,
            grad_TV.stride(0),
            weight_VD.stride(0),
            dX_TD.stride(0),
            first_tile,
            first_tile + triton.cdiv(V, lists.columns),
            lists.kept_BC.shape[1],
            T,
            V,
            D,
            FIRST=first_col == 0,
            **meta,
        )


def filtered_dw(
    out_VD: torch.Tensor,
    grad_TV: torch.Tensor,
    hidden_TD: torch.Tensor,
    lists: TileLists,
    *,
    first_col: int,
    accumulate: bool,
    config: TileConfig | None = None,
) -> None:
    """out_VD, of any strides, = grad_TV.T @ hidden_TD over kept tiles, or += with `accumulate`; summed in fp32."""
    (T, V), D = grad_TV.shape, hidden_TD.shape[1]
    config, grad, hidden, meta = _launch("filtered_dw", grad_TV, hidden_TD, "block_n", lists, config)
    with on_device(hidden_TD.device):
        filtered_dw_kernel[(triton.cdiv(V, config.block_v) * triton.cdiv(D, config.block_d),)](
            grad,
            hidden,
            out_VD,
            lists.blocks_CB,
            lists.counts_C,
            grad_TV.stride(0),
            hidden_TD.stride(0),
            *out_VD.stride(),
            first_col // lists.columns,
            lists.kept_BC.shape[0],
            T,
            V,
            D,
            ACCUMULATE=accumulate,
            **meta,
        )


def _launch(
    kernel: str,
    grad_TV: torch.Tensor,
    operand: torch.Tensor,
    operand_rows: str,
    lists: TileLists,
    config: TileConfig | None,
) -> tuple[TileConfig, Any, Any, dict[str, Any]]:
    """(config, gradient, operand, meta-parameters): a tile of the operand is [`operand_rows`, block_d]."""
    assert grad_TV.dtype == operand.dtype
    assert operand.shape[1] == 1 or operand.stride(1) == 1, "the kernels read rows of contiguous elements"
    D, V = operand.shape[1], grad_TV.shape[1]
    # Results are stored under a mask of features, which takes other D than multiples of 16 one by one.
    aligned = tma_ready(grad_TV) and tma_ready(operand) and D % 16 == 0
    config = config or table_config(kernel, grad_TV, D=D, V=V, heavy=False, aligned=aligned)
    assert lists.rows % config.block_n == 0 == lists.columns % config.block_v
    use_tma = config.tma and aligned
    grad: Any = grad_TV
    source: Any = operand
    if use_tma:
        grad = TensorDescriptor.from_tensor(grad_TV, [config.block_n, config.block_v])
        source = TensorDescriptor.from_tensor(operand, [getattr(config, operand_rows), config.block_d])
    meta: dict[str, Any] = {
        "FILTER_ROWS": lists.rows,
        "FILTER_COLUMNS": lists.columns,
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "GROUP_N": config.group_n,
        "USE_TMA": use_tma,
        "PRECISION": precision(grad_TV.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **COMPILATION,
    }
    return config, grad, source, meta


def filtered_db(db_V: torch.Tensor, grad_TV: torch.Tensor, lists: TileLists, *, first_col: int) -> None:
    """db_V, contiguous, = sums of grad_TV over the row blocks that each tile keeps, summed in fp32."""
    T, V = grad_TV.shape
    with on_device(grad_TV.device):
        filtered_db_kernel[(triton.cdiv(V, lists.columns),)](
            grad_TV,
            db_V,
            lists.blocks_CB,
            lists.counts_C,
            grad_TV.stride(0),
            first_col // lists.columns,
            lists.kept_BC.shape[0],
            T,
            V,
            FILTER_ROWS=lists.rows,
            FILTER_COLUMNS=lists.columns,
            num_warps=8,
            **COMPILATION,
        )
