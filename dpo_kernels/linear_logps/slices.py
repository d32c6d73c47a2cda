"""``linear_logps`` by vocabulary slices: never holds more than one slice of the logits. Products and elementwise passes
over a slice are given, and are what the ``torch`` and ``native`` implementations differ in.

Legend: T rows, D features, V vocabulary, v columns of a slice, C the accumulation dtype. z are logits.

Forward keeps the running maximum and sum of exponentials of each row over the slices (online softmax). With a frozen
head it also keeps sum_j e^(z_j - max) W_j, from which the gradient of each log-prob follows without a backward product.
Backward recomputes one slice of logits at a time from the saved log-sum-exp, so that each slice of dW is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.chunks import (
    BUFFER_BYTES,
    CAST_BYTES,
    accumulation_dtype,
    even_slices,
    ignored_rows,
    operand_dtype,
    row_blocks,
    spread_rows,
    used_rows,
)
from dpo_kernels.head import Gradients, Head, Needs
from dpo_kernels.linear_logps.interface import Scores, Want
from dpo_kernels.linear_logps.stats import RunningStats
from dpo_kernels.linear_logps.tile_filter import COLUMNS, num_tiles

SLICE_BYTES = 8 * 2**20
"""Logits of a slice on the CPU: fits the third-level caches, together with what is read beside it."""
FILTER_ROWS = 1
"""The rows that need a tile are gathered, so that each is filtered for itself."""


class Passes(NamedTuple):
    """What an implementation computes with; the elementwise passes go over some columns of x W^T, in place. Labels and
    the head's bias are of all V."""

    fold_slice: Callable[[Running, Tensor, Tensor, Head, slice], None]
    """(state, z_Tv, labels_T, head, columns): fold a slice into the running state; with ``weighted_TD`` leave
    e^(z - max) in its place, times the softcap's factor."""
    logits_gradient_: Callable[[Tensor, RowTerms, Head, slice], None]
    """(z_nv, terms, head, columns): turn a slice into coefficient * (onehot - softmax) * softcap factor."""
    product_: Callable[..., None]
    """As ``dpo_kernels.chunks.product_``."""


def forward(
    passes: Passes, hidden_TD: Tensor, head: Head, labels_T: Tensor, *, ignore_index: int, want: Want
) -> Scores:
    """See ``dpo_kernels.linear_logps.interface``."""
    num_rows, V = hidden_TD.shape[0], head.weight_VD.shape[0]
    ignored_T = ignored_rows(labels_T, ignore_index)
    used = used_rows(ignored_T)
    if used is not None:
        hidden_TD, labels_T, ignored_T = hidden_TD[used], labels_T[used], None
    if ignored_T is not None:
        labels_T = labels_T.masked_fill(ignored_T, 0)
    state = Running(hidden_TD, want, num_tiles(V))
    for columns, _, z_Tv, _, W_vD in _slices(passes, hidden_TD, head, COLUMNS if want.tile_mass else 1):
        passes.fold_slice(state, z_Tv, labels_T, head, columns)
        if state.weighted_TD is not None:
            passes.product_(state.weighted_TD, z_Tv.to(W_vD.dtype), W_vD, accumulate=True)
    log_sum_T = state.sum_T.log()
    logps_T = (state.label_logit_T - state.max_T) - log_sum_T
    lse_T = state.max_T.double() + log_sum_T
    dx_TD = _log_prob_gradient(state, labels_T, head, hidden_TD.dtype) if want.dx else None
    stats_KT = None if state.stats is None else state.stats.finish(state.sum_T, labels_T, V)
    mass_TC = None if state.tiles is None else state.tiles.finish(lse_T)
    if ignored_T is not None:
        logps_T.masked_fill_(ignored_T, 0)
        if dx_TD is not None:
            dx_TD.masked_fill_(ignored_T.unsqueeze(1), 0)
        if stats_KT is not None:
            stats_KT.masked_fill_(ignored_T, 0)

    def spread(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else spread_rows(rows, used, num_rows)

    if stats_KT is not None:
        stats_KT = torch.stack([spread_rows(values_T, used, num_rows) for values_T in stats_KT])
    logps_T, lse_T = spread_rows(logps_T, used, num_rows), spread_rows(lse_T, used, num_rows)
    return Scores(logps_T, lse_T, spread(dx_TD), stats_KT, spread(mass_TC))


class Running:
    """What forward carries from slice to slice."""

    def __init__(self, hidden_TD: Tensor, want: Want, tiles: int):
        T = hidden_TD.shape[0]
        dtype = accumulation_dtype(hidden_TD.dtype)
        self.max_T = hidden_TD.new_full((T,), -torch.inf, dtype=dtype)
        self.sum_T = hidden_TD.new_zeros(T, dtype=dtype)
        self.label_logit_T = hidden_TD.new_zeros(T, dtype=dtype)
        self.label_factor_T = hidden_TD.new_ones(T, dtype=dtype)
        self.weighted_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=dtype) if want.dx else None
        self.stats = RunningStats(want.stats, hidden_TD) if want.stats else None
        self.tiles = TileMass(hidden_TD.new_empty(T, tiles, dtype=dtype)) if want.tile_mass else None


class TileMass:
    """Sums of exponentials of each row's tiles, on the scale of the slice that held them."""

    def __init__(self, sum_TC: Tensor):
        self.sum_TC = sum_TC
        self.scales: list[tuple[slice, Tensor]] = []

    def fold_exps(self, exps: Tensor, rows: slice, columns: slice) -> None:
        first, whole = columns.start // COLUMNS, exps.shape[1] // COLUMNS
        tiles = exps[:, : whole * COLUMNS].unflatten(1, (whole, COLUMNS))
        torch.sum(tiles, dim=-1, out=self.sum_TC[rows, first : first + whole])
        if exps.shape[1] % COLUMNS:
            torch.sum(exps[:, whole * COLUMNS :], dim=-1, out=self.sum_TC[rows, first + whole])

    def end_slice(self, columns: slice, max_T: Tensor) -> None:
        self.scales.append((slice(columns.start // COLUMNS, num_tiles(columns.stop)), max_T.clone()))

    def finish(self, lse_T: Tensor) -> Tensor:
        """[T, C]: the probability of each row's tile."""
        for tiles, max_T in self.scales:
            self.sum_TC[:, tiles] *= (max_T - lse_T).exp().to(self.sum_TC.dtype).unsqueeze(1)
        return self.sum_TC


def _log_prob_gradient(state: Running, labels_T: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """d logps / d hidden = slope * (W[label] - sum_j p_j W_j), each W_j with its softcap factor."""
    assert state.weighted_TD is not None
    dx_TD = torch.empty_like(state.weighted_TD, dtype=dtype)
    for rows in row_blocks(dx_TD):
        label_weight = head.weight_VD[labels_T[rows]].to(state.weighted_TD.dtype)
        if head.softcap is not None:
            label_weight *= state.label_factor_T[rows].unsqueeze(1)
        label_weight -= state.weighted_TD[rows] / state.sum_T[rows].unsqueeze(1)
        dx_TD[rows] = label_weight.mul_(head.slope)
    return dx_TD


def backward(
    passes: Passes,
    grad_logps_T: Tensor,
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    lse_T: Tensor,
    *,
    ignore_index: int,
    needs: Needs,
) -> Gradients:
    """See ``dpo_kernels.linear_logps.interface``."""
    num_rows = hidden_TD.shape[0]
    # A filter keeps no tile of an ignored row.
    ignored_T = None if needs.tiles is not None else ignored_rows(labels_T, ignore_index)
    used = used_rows(ignored_T)
    if used is not None:
        hidden_TD, labels_T, lse_T, grad_logps_T = hidden_TD[used], labels_T[used], lse_T[used], grad_logps_T[used]
    elif ignored_T is not None:
        labels_T, grad_logps_T = labels_T.masked_fill(ignored_T, 0), grad_logps_T.masked_fill(ignored_T, 0)
    dtype = accumulation_dtype(hidden_TD.dtype)
    terms = RowTerms.make(labels_T, lse_T, grad_logps_T, head, dtype)
    dX_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=dtype) if needs.hidden else None
    weight_grad_VD = needs.weight_grad_VD if needs.weight else None
    dW_VD = None
    if needs.weight and weight_grad_VD is None:
        dW_VD = torch.empty_like(head.weight_VD, memory_format=torch.contiguous_format)
    db_V = torch.empty_like(head.bias_V) if needs.bias and head.bias_V is not None else None
    if needs.tiles is None:
        blocks = _slices(passes, hidden_TD, head)
    else:
        blocks = _kept_tiles(passes, hidden_TD, head, needs.tiles.kept_BC)
    for block in blocks:
        columns, z_nv, W_vD = block.columns, block.z_nv, block.W_vD
        passes.logits_gradient_(z_nv, terms.select(block.rows), head, columns)
        if db_V is not None:
            db_V[columns] = z_nv.sum(dim=0)
        z_nv = z_nv.to(W_vD.dtype)
        if dX_TD is not None:
            if block.rows is None:
                passes.product_(dX_TD, z_nv, W_vD, accumulate=True)
            else:
                dX_TD.index_add_(0, block.rows, z_nv @ W_vD)
        if weight_grad_VD is not None:
            passes.product_(weight_grad_VD[columns], z_nv.T, block.hidden_nD, accumulate=True)
        if dW_VD is not None:
            _store_product(passes, dW_VD[columns], z_nv.T, block.hidden_nD, dtype)
    if dX_TD is not None:
        dX_TD = spread_rows(dX_TD.to(hidden_TD.dtype), used, num_rows)
    return Gradients(dX_TD, dW_VD, db_V)


class RowTerms(NamedTuple):
    """What the gradient of the logits takes from each row."""

    labels: Tensor
    shift: Tensor
    """The log-sum-exp, rounded to C."""
    softmax_factor: Tensor
    """e^(z - lse) = e^(z - shift) * e^(shift - lse): what that rounding takes away."""
    coefficient: Tensor

    @classmethod
    def make(cls, labels_T: Tensor, lse_T: Tensor, grad_logps_T: Tensor, head: Head, dtype: torch.dtype) -> RowTerms:
        shift_T = lse_T.to(dtype)
        return cls(labels_T, shift_T, (shift_T - lse_T).exp().to(dtype), grad_logps_T * head.slope)

    def select(self, rows: Tensor | slice | None) -> RowTerms:
        return self if rows is None else RowTerms(*(term[rows] for term in self))


def _store_product(passes: Passes, out: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """out = a b with one rounding to the dtype of ``out``."""
    if out.dtype == dtype:
        passes.product_(out, a, b)
    else:
        raised = out.new_empty(out.shape, dtype=dtype)
        passes.product_(raised, a, b)
        out.copy_(raised)


def slice_width(T: int, D: int, V: int, itemsize: int, *, converts: bool, cuda: bool) -> int:
    """Columns of a slice: what a cache holds, but enough for an efficient product, and never beyond the buffer.

    ``converts``: the weight is converted slice by slice, which the buffer for that bounds, too.
    """
    column_bytes = max(1, T) * itemsize
    width = BUFFER_BYTES // column_bytes
    if not cuda:
        width = min(width, max(512, SLICE_BYTES // column_bytes))
    if converts:
        width = min(width, CAST_BYTES // (D * itemsize))
    return min(V, max(64, width))


def most_columns(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """Columns of the largest slice of logits."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    converts = operand_dtype(hidden_TD) != hidden_TD.dtype
    itemsize = accumulation_dtype(hidden_TD.dtype).itemsize
    return slice_width(T, D, V, itemsize, converts=converts, cuda=hidden_TD.is_cuda)


def forward_workspace(hidden_TD: Tensor, weight_VD: Tensor, need_dx: bool) -> int:
    """Most bytes that ``forward`` holds beyond its inputs and results, from shapes and dtypes alone."""
    size = _slice_bytes(hidden_TD, weight_VD)
    return size + (hidden_TD.numel() * accumulation_dtype(hidden_TD.dtype).itemsize if need_dx else 0)


def backward_workspace(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """As ``forward_workspace``, for ``backward``."""
    dtype = accumulation_dtype(hidden_TD.dtype)
    return _slice_bytes(hidden_TD, weight_VD) + (hidden_TD.numel() * dtype.itemsize if dtype != hidden_TD.dtype else 0)


def _slice_bytes(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """Of a slice of logits, and of what is converted for its product."""
    T, D = hidden_TD.shape
    dtype, operand = accumulation_dtype(hidden_TD.dtype), operand_dtype(hidden_TD)
    converts = operand != hidden_TD.dtype
    width = most_columns(hidden_TD, weight_VD)
    converted = (T + width) * D * operand.itemsize if converts else 0
    rounded = T * width * operand.itemsize if operand != dtype else 0
    return T * width * dtype.itemsize + converted + rounded


class _Block(NamedTuple):
    """Products of some rows with some columns of the head."""

    columns: slice
    rows: Tensor | None
    """Indices of the n rows, None for all of them in order."""
    z_nv: Tensor
    """x W^T in C."""
    hidden_nD: Tensor
    """Like W_vD in the dtype of products."""
    W_vD: Tensor


def _slices(passes: Passes, hidden_TD: Tensor, head: Head, multiple: int = 1) -> Iterator[_Block]:
    """All rows by slices of the vocabulary, in one reused buffer; slices begin at multiples of ``multiple``."""
    T, V = hidden_TD.shape[0], head.weight_VD.shape[0]
    dtype, operand = accumulation_dtype(hidden_TD.dtype), operand_dtype(hidden_TD)
    width = most_columns(hidden_TD, head.weight_VD)
    operand_TD = hidden_TD.to(operand)
    units = -(-V // multiple)
    largest = max(1, width // multiple)
    buffer = hidden_TD.new_empty(T * min(V, largest * multiple), dtype=dtype)
    for unit in even_slices(units, largest):
        columns = slice(unit.start * multiple, min(V, unit.stop * multiple))
        v = columns.stop - columns.start
        W_vD = head.weight_VD[columns].to(operand)
        z_Tv = buffer[: T * v].view(T, v)
        passes.product_(z_Tv, operand_TD, W_vD.T)
        yield _Block(columns, None, z_Tv, operand_TD, W_vD)


def _kept_tiles(passes: Passes, hidden_TD: Tensor, head: Head, kept_TC: Tensor) -> Iterator[_Block]:
    """Every tile of the vocabulary with the rows that keep it, which may be none: nothing else is multiplied."""
    dtype, operand = accumulation_dtype(hidden_TD.dtype), operand_dtype(hidden_TD)
    operand_TD = hidden_TD.to(operand)
    V = head.weight_VD.shape[0]
    for tile, kept_T in enumerate(kept_TC.T.contiguous()):
        columns = slice(tile * COLUMNS, min(V, (tile + 1) * COLUMNS))
        rows = kept_T.nonzero().squeeze(1)
        hidden_nD, W_vD = operand_TD[rows], head.weight_VD[columns].to(operand)
        z_nv = hidden_nD.new_empty(len(rows), len(W_vD), dtype=dtype)
        passes.product_(z_nv, hidden_nD, W_vD.T)
        yield _Block(columns, rows, z_nv, hidden_nD, W_vD)
