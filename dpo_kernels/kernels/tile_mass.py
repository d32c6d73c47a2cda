"""Probability mass of the tiles of a softmax, from the partials of the forward product: what a filter decides by.

Legend: T rows, J column tiles of the partials, C column tiles of the filter, a whole number of the former each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import COMPILATION, on_device


@triton.jit(do_not_specialize=["tile_shift_ptr", "tile_sum_ptr", "lse_ptr", "T"])
def tile_mass_kernel(
    tile_shift_ptr,
    tile_sum_ptr,
    lse_ptr,
    mass_ptr,
    T,
    num_partials,
    PARTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    row_mask = rows < T
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)
    partials = tile * PARTIALS + tl.arange(0, PARTIALS)
    mask = (partials < num_partials)[:, None] & row_mask[None, :]
    offsets = partials.to(tl.int64)[:, None] * T + rows[None, :]
    shift = tl.load(tile_shift_ptr + offsets, mask=mask, other=float("-inf"))
    # Near 1e4 only fp64 keeps what is left of the difference.
    scale = tl.exp((shift.to(tl.float64) - lse[None, :]).to(tl.float32))
    mass = tl.sum(tl.load(tile_sum_ptr + offsets, mask=mask, other=0.0) * scale, axis=0)
    tl.store(mass_ptr + tile.to(tl.int64) * T + rows, mass, mask=row_mask)


def tile_mass(
    shift_JT: torch.Tensor, sum_JT: torch.Tensor, lse_T: torch.Tensor, *, width: int, columns: int, V: int
) -> torch.Tensor:
    """[T, C] in fp32, without the label's own: partials of `width` columns, summed over tiles of `columns`."""
    assert columns % width == 0
    num_partials, T = shift_JT.shape
    num_tiles = triton.cdiv(V, columns)
    mass_CT = torch.empty(num_tiles, T, dtype=torch.float32, device=lse_T.device)
    with on_device(lse_T.device):
        tile_mass_kernel[(triton.cdiv(T, 256), num_tiles)](
            shift_JT,
            sum_JT,
            lse_T,
            mass_CT,
            T,
            num_partials,
            PARTIALS=columns // width,
            BLOCK_N=256,
            num_warps=4,
            **COMPILATION,
        )
    return mass_CT.T
