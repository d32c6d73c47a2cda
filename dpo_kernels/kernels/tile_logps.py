"""Log-probs of labels from hidden states and a head weight, without the logits: one product over the head (1G).

Legend: N rows, D hidden size, V vocabulary, T column tiles of BLOCK_V.
1. linear_stats_fwd_kernel: logits tile -> its row-wise max and sum of exponentials, and the label's logit.
2. merge_stats_kernel: T partials of a row -> log-sum-exp and log-prob, in a fixed order.
Tiles share no state: no atomics, no locks, so that two runs are bitwise equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import HeadOptions, TileLaunch
from dpo_kernels.kernels.logits_tile import final_logits, tile_position, tile_product
from dpo_kernels.kernels.tile_config import TileConfig


@triton.jit
def linear_stats_fwd_kernel(
    hidden,
    weight,
    bias_ptr,
    labels_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    label_logit_ptr,
    hidden_stride,
    weight_stride,
    N,
    V,
    D,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_n, tile_v = tile_position(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP_N)
    acc = tile_product(
        hidden, weight, hidden_stride, weight_stride, tile_n * BLOCK_N, tile_v * BLOCK_V, N, V, D,
        BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
    )  # fmt: skip

    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask = rows < N
    col_mask = cols < V
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    z = final_logits(acc, bias, logit_scale, softcap, temperature, HAS_SOFTCAP)
    z = tl.where(col_mask[None, :], z, float("-inf"))

    labels = tl.load(labels_ptr + rows, mask=row_mask, other=-1)
    is_label = cols[None, :] == labels[:, None]
    label_logit = tl.sum(tl.where(is_label, z, 0.0), axis=1)
    tile_max = tl.max(z, axis=1)
    # A bias of -inf may switch off a whole tile: its sum is 0, not exp(-inf + inf).
    shift = tl.where(tile_max == float("-inf"), 0.0, tile_max)
    tile_sum = tl.sum(tl.exp(z - shift[:, None]), axis=1)

    partial = tile_v.to(tl.int64) * N + rows
    tl.store(tile_max_ptr + partial, tile_max, mask=row_mask)
    tl.store(tile_sum_ptr + partial, tile_sum, mask=row_mask)
    owns_label = (labels >= tile_v * BLOCK_V) & (labels < tl.minimum(tile_v * BLOCK_V + BLOCK_V, V))
    tl.store(label_logit_ptr + rows, label_logit, mask=row_mask & owns_label)


@triton.jit
def merge_stats_kernel(
    tile_max_ptr,
    tile_sum_ptr,
    label_logit_ptr,
    labels_ptr,
    logps_ptr,
    lse_ptr,
    N,
    V,
    num_tiles,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    running_max = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        mask = (tiles < num_tiles)[:, None] & row_mask[None, :]
        partial = tiles.to(tl.int64)[:, None] * N + rows[None, :]
        tile_max = tl.load(tile_max_ptr + partial, mask=mask, other=float("-inf"))
        tile_sum = tl.load(tile_sum_ptr + partial, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(tile_max, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp(running_max - shift)
        running_sum += tl.sum(tile_sum * tl.exp(tile_max - shift[None, :]), axis=0)
        running_max = new_max
    lse = running_max + tl.log(running_sum)

    labels = tl.load(labels_ptr + rows, mask=row_mask, other=ignore_index)
    in_vocab = (labels >= 0) & (labels < V)
    # The label logit of a row outside the vocabulary was never written: such a row is NaN, loud and deterministic.
    label_logit = tl.load(label_logit_ptr + rows, mask=row_mask & in_vocab, other=float("nan"))
    logps = tl.where(labels == ignore_index, 0.0, label_logit - lse)
    tl.store(logps_ptr + rows, logps, mask=row_mask)
    tl.store(lse_ptr + rows, lse, mask=row_mask)


class LinearStats(NamedTuple):
    """fp32 per row: log-prob of the label (0 where ignored) and log-sum-exp of the final logits."""

    logps_N: torch.Tensor
    lse_N: torch.Tensor


def linear_stats(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    options: HeadOptions,
    ignore_index: int = -100,
    config: TileConfig | None = None,
) -> LinearStats:
    """Label log-probs and log-sum-exps; a label outside [0, V) that is not ignored gives NaN and reads nothing."""
    N, V = hidden_ND.shape[0], weight_VD.shape[0]
    logps_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
    lse_N = torch.empty_like(logps_N)
    if N == 0:
        return LinearStats(logps_N, lse_N)
    tile = TileLaunch("linear_stats_fwd_kernel", hidden_ND, weight_VD, config)
    num_tiles = triton.cdiv(V, tile.config.block_v)
    tile_max_TN = torch.empty((num_tiles, N), dtype=torch.float32, device=hidden_ND.device)
    tile_sum_TN = torch.empty_like(tile_max_TN)
    label_logit_N = torch.empty_like(logps_N)
    with tile.on_device():
        linear_stats_fwd_kernel[(tile.num_programs,)](
            tile.hidden,
            tile.weight,
            options.bias_V,
            labels_N,
            tile_max_TN,
            tile_sum_TN,
            label_logit_N,
            *tile.strides,
            N,
            V,
            hidden_ND.shape[1],
            **options.kernel_arguments(),
            **tile.meta,
        )
        merge_stats_kernel[(triton.cdiv(N, 32),)](
            tile_max_TN,
            tile_sum_TN,
            label_logit_N,
            labels_N,
            logps_N,
            lse_N,
            N,
            V,
            num_tiles,
            ignore_index,
            BLOCK_N=32,
            BLOCK_T=32,
            num_warps=4,
        )
    return LinearStats(logps_N, lse_N)
