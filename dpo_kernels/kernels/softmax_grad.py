"""Gradient of label log-probs with respect to the biased products, in place over a chunk of exponentials.

Legend: N rows of the chunk, V vocabulary, T tiles of WIDTH columns that share a shift.
`tile_logps.linear_stats` left exp(z - shift), times the softcap's part of dz/dbiased, and 0 at the label. With
p = softmax(z) and upstream gradient g, d(g * logp)/dbiased is g * (onehot - p) * dz/dbiased: one factor per row and
tile, and a value of its own at the label.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dpo_kernels.head import Head
from dpo_kernels.kernels.launch import COMPILATION, final_scalars, on_device
from dpo_kernels.kernels.logits_tile import linear_slope, logits_slope, one_minus_exp
from dpo_kernels.kernels.tile_logps import LinearStats


@triton.jit(
    do_not_specialize=["grad_ptr", "label_logit_ptr", "logps_ptr", "lse_ptr", "labels_ptr", "tile_shift_ptr", "N"]
)
def softmax_grad_kernel(
    exp_ptr,
    grad_ptr,
    label_logit_ptr,
    logps_ptr,
    lse_ptr,
    labels_ptr,
    tile_shift_ptr,
    exp_stride,
    N,
    V,
    num_tiles,
    ignore_index,
    logit_scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < N
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
    used = labels != ignore_index
    grad = tl.load(grad_ptr + rows, mask=used, other=0.0)
    logps = tl.load(logps_ptr + rows, mask=used, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=used, other=0.0)
    label_logit = tl.load(label_logit_ptr + rows, mask=used, other=0.0)
    slope = logits_slope(label_logit, logit_scale, softcap, temperature, HAS_SOFTCAP)
    label_value = grad * one_minus_exp(logps) * slope

    mask = (used & row_mask)[:, None] & (tiles < num_tiles)[None, :]
    partial = tiles.to(tl.int64)[None, :] * N + rows[:, None]
    shift = tl.load(tile_shift_ptr + partial, mask=mask, other=float("-inf"))
    row_factor = -grad * linear_slope(logit_scale, temperature)
    factor = row_factor[:, None] * tl.exp((shift - lse[:, None]).to(tl.float32))

    cols = tiles[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    exp_ptrs = exp_ptr + rows.to(tl.int64)[:, None, None] * exp_stride + cols[None, :, :]
    inside = row_mask[:, None, None] & (cols < V)[None, :, :]
    exps = tl.load(exp_ptrs, mask=inside & used[:, None, None], other=0.0).to(tl.float32)
    gradient = tl.where(
        cols[None, :, :] == labels[:, None, None], label_value[:, None, None], exps * factor[:, :, None]
    )
    tl.store(exp_ptrs, gradient.to(exp_ptr.dtype.element_ty), mask=inside)


def softmax_grad_(
    exps: torch.Tensor,
    grad_N: torch.Tensor,
    head: Head,
    labels_N: torch.Tensor,
    stats: LinearStats,
    *,
    ignore_index: int,
) -> torch.Tensor:
    """Overwrite `exps` with d(sum grad * logps)/dbiased and return its [N, V] part; exactly 0 on ignored rows.

    grad_N is fp32, the upstream gradient of each row's log-prob; `stats` come from the call that filled `exps`.
    """
    N, V = labels_N.shape[0], head.weight_VD.shape[0]
    num_tiles = triton.cdiv(V, stats.width)
    block_n, block_t = 8, 512 // stats.width
    with on_device(exps.device):
        softmax_grad_kernel[(triton.cdiv(N, block_n), triton.cdiv(num_tiles, block_t))](
            exps,
            grad_N,
            stats.label_logit_N,
            stats.logps_N,
            stats.lse_N,
            labels_N,
            stats.tile_shift_TN,
            exps.stride(0),
            N,
            V,
            num_tiles,
            ignore_index,
            **final_scalars(head),
            WIDTH=stats.width,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            num_warps=4,
            **COMPILATION,
        )
    return exps[:N, :V]
