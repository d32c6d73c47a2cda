"""``linear_logps`` by Triton kernels: tiles of logits that never leave the chip, products by the vendor's library.

Legend: T rows, D features, V vocabulary, v columns of a slice.

Forward is one product. Backward recomputes logits by slices of the vocabulary (4 products in all), writes each slice of
dW once and needs one slice of gradients in the compute dtype as workspace. With a frozen head forward also forms dX, in
one more product, and there is no backward (2 in all).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_kernels.kernels.frozen_head import frozen_head
from dpo_kernels.kernels.launch import HeadOptions, obstacle
from dpo_kernels.kernels.products import add_product_
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.tile_logps import linear_stats
from dpo_kernels.kernels.token_stats import TOKEN_STATS

SLICE_BYTES = 160 * 2**20
"""Size of a slice: with fp32 dX beside it, 8192 rows of 4096 features stay within 300 MiB."""
MIN_SLICE = 4096
"""Narrower slices would spend more time on reading and writing dX than on products."""

STATS = TOKEN_STATS
"""Token statistics that the kernels compute."""


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """See ``dpo_kernels.linear_logps.ops``."""
    return obstacle(device_type, dtype)


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    need_dx: bool,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See ``dpo_kernels.linear_logps.ops``."""
    options = HeadOptions(bias_V=bias_V, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    dx_TD = None
    if need_dx:
        logps_T, lse_T, dx_TD, stats_KT = frozen_head(
            hidden_TD,
            weight_VD,
            labels_T,
            slice_columns=slice_columns(hidden_TD),
            options=options,
            ignore_index=ignore_index,
            token_stats=bool(stats),
        )
    else:
        logps_T, lse_T, *_, stats_KT = linear_stats(
            hidden_TD, weight_VD, labels_T, options=options, ignore_index=ignore_index, token_stats=bool(stats)
        )
    if stats_KT is not None:
        stats_KT = torch.stack([stats_KT[STATS.index(name)] for name in stats])
    return logps_T, lse_T, dx_TD, stats_KT


def backward(
    grad_logps_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    lse_T: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_grad_VD: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``dpo_kernels.linear_logps.ops``."""
    options = HeadOptions(bias_V=bias_V, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    width = min(V, slice_columns(hidden_TD))
    # Rows of 16 bytes keep the products on aligned operands whatever V is.
    pitch = -(-width // 8) * 8
    slice_Tv = hidden_TD.new_empty(T, pitch)
    dX_TD = hidden_TD.new_empty(T, D, dtype=torch.float32) if need_hidden else None
    dW_VD = weight_VD.new_empty(V, D) if need_weight and weight_grad_VD is None else None
    db_V = bias_V.new_empty(V) if need_bias and bias_V is not None else None
    for start in range(0, V, width):
        columns = slice(start, min(V, start + width))
        weight_vD = weight_VD[columns]
        gradient_Tv = slice_Tv[:, : weight_vD.shape[0]]
        slice_grad(
            hidden_TD,
            weight_vD,
            labels_T,
            lse_T,
            grad_logps_T,
            gradient_Tv,
            first_col=start,
            ignore_index=ignore_index,
            options=options.columns(columns.start, columns.stop),
        )
        if dX_TD is not None:
            add_product_(dX_TD, gradient_Tv, weight_vD, first=start == 0)
        if need_weight and weight_grad_VD is not None:
            add_product_(weight_grad_VD[columns], gradient_Tv.T, hidden_TD)
        if dW_VD is not None:
            torch.mm(gradient_Tv.T, hidden_TD, out=dW_VD[columns])
        if db_V is not None:
            db_V[columns] = gradient_Tv.sum(dim=0, dtype=torch.float32)
    return None if dX_TD is None else dX_TD.to(hidden_TD.dtype), dW_VD, db_V


def slice_columns(hidden_TD: Tensor) -> int:
    """Columns of a slice: SLICE_BYTES worth of them, in whole tiles."""
    columns = SLICE_BYTES // (hidden_TD.shape[0] * hidden_TD.element_size())
    return max(MIN_SLICE, columns // 256 * 256)
