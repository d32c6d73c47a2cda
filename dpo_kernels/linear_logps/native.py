"""``linear_logps`` by vocabulary slices, with the native library's passes over them and products: for the CPU.

Legend: T rows, n rows of a block, v columns of a slice. z are logits.
"""

from __future__ import annotations

import functools

from torch import Tensor

from dpo_kernels.head import Head
from dpo_kernels.linear_logps import slices
from dpo_kernels.linear_logps.slices import FILTER_ROWS, RowTerms, Running
from dpo_kernels.linear_logps.tile_filter import COLUMNS, num_tiles
from dpo_kernels.native_passes import Found, Keep, fold_, gradient_, why_not
from dpo_kernels.native_products import product_, scratch_bytes

__all__ = ["FILTER_ROWS", "backward", "backward_workspace", "forward", "forward_workspace", "why_not"]


def fold_slice(state: Running, z_Tv: Tensor, labels_T: Tensor, head: Head, columns: slice) -> None:
    """See ``dpo_kernels.linear_logps.slices.Passes``."""
    tile_sum_TC = None
    if state.tiles is not None:
        tile_sum_TC = state.tiles.sum_TC[:, columns.start // COLUMNS : num_tiles(columns.stop)]
    found = Found(
        state.max_T,
        state.sum_T,
        state.label_logit_T,
        state.label_factor_T,
        state.weighted_TD,
        state.stats,
        tile_sum_TC,
    )
    fold_(z_Tv, labels_T, head, columns.start, found, Keep.INPUT if state.weighted_TD is None else Keep.EXPS)
    if state.tiles is not None:
        state.tiles.end_slice(columns, state.max_T)


def logits_gradient_(z_nv: Tensor, terms: RowTerms, head: Head, columns: slice) -> None:
    """See ``dpo_kernels.linear_logps.slices.Passes``."""
    gradient_(
        z_nv,
        terms.labels,
        head,
        columns.start,
        shift_n=terms.shift,
        softmax_factor_n=terms.softmax_factor,
        coefficient_n=terms.coefficient,
    )


def forward_workspace(hidden_TD: Tensor, weight_VD: Tensor, need_dx: bool) -> int:
    """As ``slices.forward_workspace``, and what products take in the library."""
    return slices.forward_workspace(hidden_TD, weight_VD, need_dx) + _scratch_bytes(hidden_TD, weight_VD)


def backward_workspace(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """As ``slices.backward_workspace``, and what products take in the library."""
    return slices.backward_workspace(hidden_TD, weight_VD) + _scratch_bytes(hidden_TD, weight_VD)


def _scratch_bytes(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    (T, D), v = hidden_TD.shape, slices.most_columns(hidden_TD, weight_VD)
    return max(scratch_bytes(T, v, D), scratch_bytes(T, D, v), scratch_bytes(v, D, T))


PASSES = slices.Passes(fold_slice, logits_gradient_, product_)
forward = functools.partial(slices.forward, PASSES)
backward = functools.partial(slices.backward, PASSES)
