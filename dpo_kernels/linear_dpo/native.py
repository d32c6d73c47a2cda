"""The paired loss by chunks of whole pairs, with the native library's passes and products: for the CPU.

Legend: n rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dpo_kernels.head import Head
from dpo_kernels.linear_dpo import pair_chunks
from dpo_kernels.linear_dpo.pair_chunks import Passes, RowLogps
from dpo_kernels.linear_logps.stats import RunningStats
from dpo_kernels.native_passes import Found, Keep, convert_, fold_, why_not
from dpo_kernels.native_products import product_, scratch_bytes

__all__ = ["forward", "forward_workspace", "scale_", "why_not"]


def logits_pass(a_nV: Tensor, labels_n: Tensor, head: Head, stats: RunningStats | None, rows: slice) -> RowLogps:
    """See ``dpo_kernels.linear_dpo.pair_chunks.Passes``. Products take on the division by sums of exponentials."""
    n = len(a_nV)
    max_n, sum_n, label_logit_n = a_nV.new_full((n,), -torch.inf), a_nV.new_zeros(n), a_nV.new_empty(n)
    found = Found(max_n, sum_n, label_logit_n, stats=None if stats is None else stats.part(rows))
    fold_(a_nV, labels_n, head, 0, found, Keep.EXPS_LESS_LABEL)
    return RowLogps((label_logit_n - max_n) - sum_n.log(), sum_n, -1 / sum_n)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """See ``dpo_kernels.linear_dpo.interface``. 1, the factor of a loss that nothing scales, multiplies nothing: dW is
    as large as the weight."""
    return gradient if factor.item() == 1 else gradient.mul_(factor)


def forward_workspace(hidden_TD: Tensor, weight_VD: Tensor, cu_responses: list[int], need_weight: bool) -> int:
    """As ``pair_chunks.forward_workspace``, and what products take in the library."""
    n, (V, D) = pair_chunks.most_rows(hidden_TD, weight_VD, cu_responses), weight_VD.shape
    products = max(scratch_bytes(n, V, D), scratch_bytes(n, D, V), scratch_bytes(V, D, n))
    return pair_chunks.forward_workspace(hidden_TD, weight_VD, cu_responses, need_weight) + products


PASSES = Passes(logits_pass, product_, convert_)
forward = functools.partial(pair_chunks.forward, PASSES)
