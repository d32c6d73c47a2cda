"""The paired loss by chunks of whole pairs, with the native library's pass over the logits: for the CPU.

Legend: n rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dpo_kernels.head import Head
from dpo_kernels.linear_dpo import pair_chunks
from dpo_kernels.linear_dpo.pair_chunks import RowLogps, forward_workspace
from dpo_kernels.linear_logps.stats import RunningStats
from dpo_kernels.native_passes import Found, Keep, fold_, why_not

__all__ = ["forward", "forward_workspace", "scale_", "why_not"]


def logits_pass(a_nV: Tensor, labels_n: Tensor, head: Head, stats: RunningStats | None, rows: slice) -> RowLogps:
    """See ``dpo_kernels.linear_dpo.pair_chunks.Pass``: the division by sums of exponentials is left to the products."""
    n = len(a_nV)
    max_n, sum_n, label_logit_n = a_nV.new_full((n,), -torch.inf), a_nV.new_zeros(n), a_nV.new_empty(n)
    found = Found(max_n, sum_n, label_logit_n, stats=None if stats is None else stats.part(rows))
    fold_(a_nV, labels_n, head, 0, found, Keep.EXPS_LESS_LABEL)
    return RowLogps((label_logit_n - max_n) - sum_n.log(), sum_n, -1 / sum_n)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """See ``dpo_kernels.linear_dpo.interface``. 1, the factor of a loss that nothing scales, multiplies nothing: dW is
    as large as the weight."""
    return gradient if factor.item() == 1 else gradient.mul_(factor)


forward = functools.partial(pair_chunks.forward, logits_pass)
