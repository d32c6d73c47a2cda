"""The paired loss by chunks of whole pairs in plain torch: runs anywhere.

Elementwise passes go over small blocks of rows, which stay in cache from pass to pass.

Legend: n rows of a chunk, b rows of a block, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dpo_kernels.chunks import add_at_, logits_, product_, row_blocks, scale_rows_
from dpo_kernels.head import Head
from dpo_kernels.linear_dpo import pair_chunks
from dpo_kernels.linear_dpo.pair_chunks import Passes, RowLogps, forward_workspace
from dpo_kernels.linear_logps.stats import RunningStats

__all__ = ["forward", "forward_workspace"]


def logits_pass(a_nV: Tensor, labels_n: Tensor, head: Head, stats: RunningStats | None, rows: slice) -> RowLogps:
    """See ``dpo_kernels.linear_dpo.pair_chunks.Passes``."""
    logps_n, total_n = a_nV.new_empty(len(a_nV)), a_nV.new_empty(len(a_nV))
    for block in row_blocks(a_nV):
        block_T = slice(rows.start + block.start, rows.start + block.stop)
        logps_n[block], total_n[block] = _pass_over_block(a_nV[block], labels_n[block], head, stats, block_T)
    return RowLogps(logps_n, total_n)


def _pass_over_block(
    a_bV: Tensor, labels_b: Tensor, head: Head, stats: RunningStats | None, rows: slice
) -> tuple[Tensor, Tensor]:
    """(log-probs, sums of exponentials) of a few ``rows`` of x W^T, which turn into (onehot - softmax) times the
    softcap's factor; ``stats`` take in their logits."""
    factor = logits_(a_bV, head, slice(None), want_factor=True)
    if stats is not None:
        stats.fold_logits(a_bV, rows, 0)
    label_logit = a_bV.gather(1, labels_b.unsqueeze(1)).squeeze(1)
    largest = a_bV.amax(dim=1)
    a_bV.sub_(largest.unsqueeze(1)).exp_()
    total = a_bV.sum(dim=1)
    if stats is not None:
        nothing = torch.zeros_like(total)
        stats.fold_exps(a_bV, rows, nothing, nothing)
    a_bV.mul_((-1 / total).unsqueeze(1))
    add_at_(a_bV, labels_b, torch.ones_like(total))
    if factor is not None:
        a_bV.mul_(factor)
    return (label_logit - largest) - total.log(), total


PASSES = Passes(logits_pass, product_, scale_rows_)
forward = functools.partial(pair_chunks.forward, PASSES)
