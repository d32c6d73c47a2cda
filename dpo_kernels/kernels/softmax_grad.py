"""Gradient of label log-probs with respect to the biased products, in place over a chunk of exponentials.

Legend: T rows of the chunk, V vocabulary, J tiles of WIDTH columns that share a shift.
`tile_logps.score_rows` left exp(z - shift), times the softcap's part of dz/dbiased, and 0 at the label. With
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
from dpo_kernels.kernels.tile_logps import RowScores


@triton.jit(
    do_not_specialize=["grad_ptr", "label_logit_ptr", "logps_ptr", "lse_ptr", "labels_ptr", "tile_shift_ptr", "T"]
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
    T,
    V,
    num_tiles,
    ignore_index,
    logit_scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row_mask = rows < T
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
    used = labels != ignore_index
    grad = tl.load(grad_ptr + rows, mask=used, other=0.0)
    logps = tl.load(logps_ptr + rows, mask=used, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=used, other=0.0)
    label_logit = tl.load(label_logit_ptr + rows, mask=used, other=0.0)
    slope = logits_slope(label_logit, logit_scale, softcap, temperature, HAS_SOFTCAP)
    label_value = grad * one_minus_exp(logps) * slope

    mask = (used & row_mask)[:, None] & (tiles < num_tiles)[None, :]
    partial = tiles.to(tl.int64)[None, :] * T + rows[:, None]
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
    grad_T: torch.Tensor,
    head: Head,
    labels_T: torch.Tensor,
    scores: RowScores,
    *,
    ignore_index: int,
) -> torch.Tensor:
    """Overwrite `exps` with d(sum grad * logps)/dbiased and return its [T, V] part; exactly 0 on ignored rows.

    grad_T is fp32, the upstream gradient of each row's log-prob; `scores` come from the call that filled `exps`.
    """
    T, V = labels_T.shape[0], head.weight_VD.shape[0]
    num_tiles = triton.cdiv(V, scores.width)
    block_n, block_t = 8, 512 // scores.width
    with on_device(exps.device):
        softmax_grad_kernel[(triton.cdiv(T, block_n), triton.cdiv(num_tiles, block_t))](
            exps,
            grad_T,
            scores.label_logit_T,
            scores.logps_T,
            scores.lse_T,
            labels_T,
            scores.tile_shift_JT,
            exps.stride(0),
            T,
            V,
            num_tiles,
            ignore_index,
            **final_scalars(head),
            WIDTH=scores.width,
            BLOCK_N=block_n,
            BLOCK_J=block_t,
            num_warps=4,
            **COMPILATION,
        )
    return exps[:T, :V]
