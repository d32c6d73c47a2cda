"""Rows picked from a tensor, some of them several times, with a gradient whose bits do not depend on luck.

The rows of a shared prompt are keys of every response, and its last row predicts the first token of each. The backward
pass of ``index_select`` adds the gradients of such a row in whatever order a GPU's threads arrive, and with three
addends the order changes the sum. Here it is fixed.

Shape suffixes: T rows to pick from, K picks, U rows that are picked at least once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def pick_order(rows_K: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """In which order ``gather_rows`` adds the gradients of picks.

    Args:
        rows_K: the picked rows.

    Returns:
        int64 [K], the picks: first the first pick of every row, then the second picks, and so on, rows with the most
        picks in front each time; and how many there are of each kind. So the rows that have an n-th pick are a prefix
        of those that have a first one.
    """
    by_row = np.argsort(rows_K, kind="stable")
    sorted_rows = rows_K[by_row]
    starts = np.flatnonzero(np.r_[True, sorted_rows[1:] != sorted_rows[:-1]])
    picks = np.diff(np.r_[starts, len(rows_K)])
    number = np.arange(len(rows_K)) - np.repeat(starts, picks)
    order_K = by_row[np.lexsort((sorted_rows, -np.repeat(picks, picks), number))]
    return order_K, tuple(np.bincount(number).tolist())


def gather_rows(x: torch.Tensor, rows_K: torch.Tensor, order_K: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """``x.index_select(0, rows_K)`` whose gradient is the same to the bit in every run.

    Gradients of a row that is picked more than once are added in float32, or in float64 if they have it, and rounded
    once. Nothing waits for the device.

    Args:
        x: [T, ...].
        rows_K: int64 [K].
        order_K, counts: what ``pick_order`` gives for these rows, the first as a tensor on the device of ``x``.

    Returns:
        [K, ...].
    """
    result: torch.Tensor = _GatherRows.apply(x, rows_K, order_K, counts)
    return result


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows_K: torch.Tensor, order_K: torch.Tensor, counts: tuple[int, ...]):
        ctx.save_for_backward(rows_K, order_K)
        ctx.counts, ctx.num_rows = counts, x.shape[0]
        return x.index_select(0, rows_K)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (grad,) = grads
        rows_K, order_K = ctx.saved_tensors
        first_U, *others = order_K.split(ctx.counts)
        sums = grad.index_select(0, first_U)
        if others:
            several = sums[: len(others[0])].to(torch.promote_types(grad.dtype, torch.float32))
            for picks in others:
                several[: len(picks)] += grad.index_select(0, picks)
            sums[: len(several)] = several
        result = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return result.index_copy_(0, rows_K.index_select(0, first_U), sums), None, None, None
