"""Numbers about each token's distribution that trainers log: entropy, top-1 hit and others, without the logits matrix.

Legend: N rows, D features, V vocabulary, v columns of a slice. z are logits, p their softmax, m a row's maximum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from dpo_kernels.chunks import (
    BUFFER_BYTES,
    Head,
    accumulation_dtype,
    even_slices,
    logits_,
    operand_dtype,
    product_,
    row_blocks,
)

STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class _Running:
    """What is carried from slice to slice, relative to the maximum so far. ``entropy_N`` is -sum e^(z-m) (z-m)."""

    def __init__(self, like: Tensor):
        N, dtype = like.shape[0], accumulation_dtype(like.dtype)
        # Finite, so that the first rescaling is 0 times a number and not 0 times infinity.
        self.max_N = like.new_full((N,), torch.finfo(dtype).min, dtype=dtype)
        self.sum_N, self.entropy_N, self.square_N, self.logits_N = (like.new_zeros(N, dtype=dtype) for _ in range(4))
        self.top_N = torch.zeros_like(self.max_N, dtype=torch.int64)

    def fold_(self, z: Tensor, rows: slice, first_column: int, names: frozenset[str]) -> None:
        """Take in logits [rows, v]; overwrites them."""
        top, index = z.max(dim=1)
        old = self.max_N[rows]
        self.top_N[rows] = torch.where(top > old, index + first_column, self.top_N[rows])
        if "mean_logits" in names:
            self.logits_N[rows] += z.sum(dim=1)
        if names.isdisjoint(("entropy", "log_sum_sq_probs")):
            self.max_N[rows] = torch.maximum(old, top)
            return
        new = torch.maximum(old, top)
        exps = z.sub_(new.unsqueeze(1)).exp_()
        gap = new - old
        shrink = torch.exp(-gap)
        total = self.sum_N[rows]
        if "entropy" in names:
            self.entropy_N[rows] = (self.entropy_N[rows] + gap * total) * shrink + torch.special.entr(exps).sum(dim=1)
        self.sum_N[rows] = total * shrink + exps.sum(dim=1)
        if "log_sum_sq_probs" in names:
            self.square_N[rows] = self.square_N[rows] * shrink.square() + exps.square_().sum(dim=1)
        self.max_N[rows] = new


@torch.no_grad()
def token_stats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    names: Collection[str],
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Statistics of the distribution of each row, detached. Costs one product of 2 N D V operations.

    Args:
        hidden_ND, weight_VD, bias, softcap, logit_scale, temperature: as in ``linear_logps``, of one dtype.
        labels_N: [N], int64, each in [0, V).
        names: what to compute, of ``STATS``.

    Returns:
        name -> [N], float32 (float64 for float64 inputs) but for ``is_top1``, which is bool.
        ``entropy``: -sum p log p, in nats. ``log_sum_sq_probs``: log sum p^2. ``mean_logits``: mean of z over V.
        ``is_top1``: whether the label has the largest logit, the first of them where several are equal.
    """
    names = frozenset(names)
    unknown = names.difference(STATS)
    if unknown:
        raise ValueError(f"token statistics must be among {', '.join(STATS)}; got {', '.join(sorted(unknown))}")
    if not names:
        return {}
    head = Head(weight_VD, bias, softcap, logit_scale, temperature)
    state = _Running(hidden_ND)
    for columns, z_Nv in _slices(hidden_ND, head):
        for rows in row_blocks(z_Nv):
            z = z_Nv[rows]
            logits_(z, head, columns)
            state.fold_(z, rows, columns.start, names)
    found = {}
    if "entropy" in names:
        found["entropy"] = state.sum_N.log() + state.entropy_N / state.sum_N
    if "log_sum_sq_probs" in names:
        found["log_sum_sq_probs"] = state.square_N.log() - 2 * state.sum_N.log()
    if "mean_logits" in names:
        found["mean_logits"] = state.logits_N / weight_VD.shape[0]
    if "is_top1" in names:
        found["is_top1"] = state.top_N == labels_N
    return found


def _slices(hidden_ND: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """(columns, x W^T of those columns in the accumulation dtype), in one reused buffer."""
    N, V = hidden_ND.shape[0], head.weight_VD.shape[0]
    dtype, operand = accumulation_dtype(hidden_ND.dtype), operand_dtype(hidden_ND)
    operand_ND = hidden_ND.to(operand)
    largest = min(V, max(64, BUFFER_BYTES // (max(1, N) * dtype.itemsize)))
    buffer = hidden_ND.new_empty(N * largest, dtype=dtype)
    for columns in even_slices(V, largest):
        width = columns.stop - columns.start
        z_Nv = buffer[: N * width].view(N, width)
        product_(z_Nv, operand_ND, head.weight_VD[columns].to(operand).T)
        yield columns, z_Nv
