"""``linear_logps`` by vocabulary slices in plain torch: runs anywhere.

Elementwise passes go over small blocks of rows, which stay in cache from pass to pass.

Legend: T rows, n rows of a block, v columns of a slice. z are logits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dpo_kernels.chunks import add_at_, logits_, product_, row_blocks
from dpo_kernels.head import Head
from dpo_kernels.linear_logps import slices
from dpo_kernels.linear_logps.slices import FILTER_ROWS, RowTerms, Running, backward_workspace, forward_workspace

__all__ = ["FILTER_ROWS", "backward", "backward_workspace", "forward", "forward_workspace"]


def fold_slice(state: Running, z_Tv: Tensor, labels_T: Tensor, head: Head, columns: slice) -> None:
    """See ``dpo_kernels.linear_logps.slices.Passes``."""
    local_T = labels_T - columns.start
    inside_T = (local_T >= 0) & (local_T < z_Tv.shape[1])
    index_T = local_T.clamp(0, z_Tv.shape[1] - 1)
    for rows in row_blocks(z_Tv):
        z = z_Tv[rows]
        factor = logits_(z, head, columns, want_factor=state.weighted_TD is not None)
        _note_label(state.label_logit_T, rows, z, index_T, inside_T)
        if factor is not None:
            _note_label(state.label_factor_T, rows, factor, index_T, inside_T)
        # Kept finite: a slice whose logits are all -inf, by a bias that masks tokens, must add 0 and not nan.
        new_max = torch.maximum(state.max_T[rows], z.amax(dim=1).clamp_(min=torch.finfo(z.dtype).min))
        if state.stats is not None:
            state.stats.fold_logits(z, rows, columns.start)
        z.sub_(new_max.unsqueeze(1)).exp_()
        if state.stats is not None:
            state.stats.fold_exps(z, rows, state.sum_T[rows], new_max - state.max_T[rows])
        if state.tiles is not None:
            state.tiles.fold_exps(z, rows, columns)
        shrink = torch.exp(state.max_T[rows] - new_max)
        state.sum_T[rows] = state.sum_T[rows] * shrink + z.sum(dim=1)
        state.max_T[rows] = new_max
        if state.weighted_TD is not None:
            state.weighted_TD[rows] *= shrink.unsqueeze(1)
            if factor is not None:
                z.mul_(factor)
    if state.tiles is not None:
        state.tiles.end_slice(columns, state.max_T)


def _note_label(noted_T: Tensor, rows: slice, values: Tensor, index_T: Tensor, inside_T: Tensor) -> None:
    """Note each row's value at its label, where the label is one of these columns."""
    at_label = values.gather(1, index_T[rows].unsqueeze(1)).squeeze(1)
    noted_T[rows] = torch.where(inside_T[rows], at_label, noted_T[rows])


def logits_gradient_(z_nv: Tensor, terms: RowTerms, head: Head, columns: slice) -> None:
    """See ``dpo_kernels.linear_logps.slices.Passes``."""
    local = terms.labels - columns.start
    coefficient = terms.coefficient * ((local >= 0) & (local < z_nv.shape[1]))
    index = local.clamp(0, z_nv.shape[1] - 1)
    for rows in row_blocks(z_nv):
        z = z_nv[rows]
        factor = logits_(z, head, columns, want_factor=True)
        z.sub_(terms.shift[rows].unsqueeze(1)).exp_()
        z.mul_((-terms.coefficient[rows] * terms.softmax_factor[rows]).unsqueeze(1))
        add_at_(z, index[rows], coefficient[rows])
        if factor is not None:
            z.mul_(factor)


PASSES = slices.Passes(fold_slice, logits_gradient_, product_)
forward = functools.partial(slices.forward, PASSES)
backward = functools.partial(slices.backward, PASSES)
