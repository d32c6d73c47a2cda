"""The paired loss by chunks of whole pairs: three products, one logits buffer. The products and the elementwise pass
over the logits are given, and are what the ``torch`` and ``native`` implementations differ in.

Legend: T rows, D features, V vocabulary, n rows of a chunk, S responses, P pairs, C the accumulation dtype.

Per chunk: logits -> (onehot - softmax) in the same buffer, with the log-probs as a by-product -> log-prob sums ->
slopes from the loss table -> dX rows and a share of dW. The slopes of a pair that is too long for the buffer are known
only after all of its rows: its responses gather dW unscaled in buffers of their own, added with the slope at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels import native
from dpo_kernels.chunks import (
    BUFFER_BYTES,
    CAST_BYTES,
    Chunk,
    accumulation_dtype,
    early_gradient_dtype,
    even_slices,
    ignored_rows,
    operand_dtype,
    plan_chunks,
    spread_rows,
    sum_responses,
    used_rows,
    weight_blocks,
)
from dpo_kernels.head import Gradients, Head, Needs
from dpo_kernels.linear_dpo.interface import PairLosses, PairScorer, Want
from dpo_kernels.linear_logps.stats import RunningStats


class RowLogps(NamedTuple):
    """What the pass over the logits finds of each row."""

    logps_n: Tensor
    total_n: Tensor
    """Sums of exponentials relative to the largest logit."""
    scale_n: Tensor | None = None
    """What the block's rows lack as gradients of log-probs, where that is left to the small factors of the products."""


class Passes(NamedTuple):
    """What an implementation computes with."""

    logits: Callable[[Tensor, Tensor, Head, RunningStats | None, slice], RowLogps]
    """(a_nV, labels_n, head, stats, rows): turn ``rows`` of x W^T in place into (onehot - softmax) times the softcap's
    factor, each row up to its ``scale_n``; ``stats`` take in their logits."""
    product_: Callable[..., None]
    """As ``dpo_kernels.chunks.product_``."""
    scale_rows_: Callable[[Tensor, Tensor, Tensor], object]
    """As ``dpo_kernels.chunks.scale_rows_``, where ``out`` may be the rows themselves."""


def forward(
    passes: Passes,
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    scorer: PairScorer,
    *,
    ignore_index: int,
    want: Want,
) -> PairLosses:
    """See ``dpo_kernels.linear_dpo.interface``."""
    T = hidden_TD.shape[0]
    ignored_T = ignored_rows(labels_T, ignore_index)
    used = used_rows(ignored_T)
    if used is not None:
        cu_S1 = torch.searchsorted(used, scorer.cu_S1)
        weights_T = None if scorer.token_weights_T is None else scorer.token_weights_T[used]
        scorer = scorer._replace(cu_S1=cu_S1, offsets=cu_S1.tolist(), token_weights_T=weights_T)
        hidden_TD, labels_T, ignored_T = hidden_TD[used], labels_T[used], None
    call = _Call(passes, hidden_TD, head, labels_T, ignored_T, scorer, want.gradients)
    if want.stats:
        call.stats = RunningStats(want.stats, hidden_TD)
    losses, sums = [], []
    chunks, max_rows = _chunks(scorer.offsets, head.weight_VD, call.dtype)
    for chunk in chunks:
        chunk_losses, chunk_sums = call.split_pair(chunk, max_rows) if chunk.split else call.whole_pairs(chunk)
        losses.append(chunk_losses)
        sums.append(chunk_sums)
    dX_TD, (dW_VD, db_V) = call.dX_TD, call.of_head.finish()
    gradient_dtype = early_gradient_dtype(hidden_TD.dtype)
    gradients = Gradients(
        None if dX_TD is None else spread_rows(dX_TD.to(gradient_dtype), used, T),
        None if dW_VD is None else dW_VD.to(gradient_dtype),
        None if db_V is None else db_V.to(gradient_dtype),
    )
    return PairLosses(torch.cat(losses), torch.cat(sums), gradients, call.token_stats(used, T))


def _chunks(cu_responses: list[int], weight_VD: Tensor, dtype: torch.dtype) -> tuple[list[Chunk], int]:
    """The chunks of a call, and the most rows of one that is part of a split pair."""
    V, D = weight_VD.shape
    max_rows = max(1, BUFFER_BYTES // (V * dtype.itemsize))
    # With 4 D rows a chunk, reading and writing dW is small beside the products; more only strains the caches.
    rows_of_chunk = min(max_rows, max(256, 4 * D))
    # A split pair costs buffers of the size of dW; logits smaller than that are the better deal.
    return plan_chunks(cu_responses, rows_of_chunk, max_rows_of_pair=max(max_rows, D)), max_rows


def most_rows(hidden_TD: Tensor, weight_VD: Tensor, cu_responses: list[int]) -> int:
    """Rows of the largest block of logits that ``forward`` holds."""
    chunks, max_rows = _chunks(cu_responses, weight_VD, accumulation_dtype(hidden_TD.dtype))
    ends = cu_responses[::2]
    return max(max_rows if c.split else ends[c.first_pair + c.num_pairs] - ends[c.first_pair] for c in chunks)


def forward_workspace(hidden_TD: Tensor, weight_VD: Tensor, cu_responses: list[int], need_weight: bool) -> int:
    """Most bytes that ``forward`` holds beyond its inputs and results, from shapes and dtypes alone; without statistics
    of tokens, which take a second block of exponentials: cached rows on the CPU, a whole chunk of them on a GPU."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    dtype, operand = accumulation_dtype(hidden_TD.dtype), operand_dtype(hidden_TD)
    chunks, _ = _chunks(cu_responses, weight_VD, dtype)
    rows = most_rows(hidden_TD, weight_VD, cu_responses)
    size = rows * V * dtype.itemsize + rows * D * dtype.itemsize
    if need_weight and any(chunk.split for chunk in chunks):
        size += 2 * V * D * dtype.itemsize
    if operand != hidden_TD.dtype:
        size += min(CAST_BYTES, V * D * operand.itemsize)
    if operand != dtype:
        size += rows * V * operand.itemsize
    if dtype != early_gradient_dtype(hidden_TD.dtype):
        size += (T * D + (V * D if need_weight else 0)) * dtype.itemsize
    return size


class _HeadGradient:
    """dW and db, or a share of them, in C."""

    def __init__(self, passes: Passes, head: Head, needs: Needs, dtype: torch.dtype):
        self.passes = passes
        device = head.weight_VD.device
        self.dW_VD = None
        if needs.weight:
            self.dW_VD = native.in_huge_pages(torch.empty(head.weight_VD.shape, dtype=dtype, device=device))
        self.db_V = None
        if needs.bias and head.bias_V is not None:
            self.db_V = torch.zeros(head.bias_V.shape, dtype=dtype, device=device)
        # The first product is stored where later ones are added, which saves clearing dW.
        self._begun = False

    def add(self, gradient_nV: Tensor, hidden_nD: Tensor, slope_n: Tensor, operand: torch.dtype) -> None:
        """Add what rows give whose gradient of the logits is ``gradient_nV``, times ``slope_n``."""
        if self.dW_VD is not None:
            # The slope goes into the small factor of the product.
            x_nD = torch.empty_like(hidden_nD, dtype=operand)
            self.passes.scale_rows_(x_nD, hidden_nD, slope_n)
            self.passes.product_(self.dW_VD, gradient_nV.T.to(operand), x_nD, accumulate=self._begun)
        if self.db_V is not None:
            self.db_V.addmv_(gradient_nV.T, slope_n)
        self._begun = True

    def add_scaled(self, share: _HeadGradient, slope: Tensor) -> None:
        """Add a share times a number; the share is used up."""
        if not share._begun:
            return
        if self.dW_VD is not None and share.dW_VD is not None:
            share.dW_VD.mul_(slope)
            self.dW_VD.add_(share.dW_VD) if self._begun else self.dW_VD.copy_(share.dW_VD)
        if self.db_V is not None and share.db_V is not None:
            self.db_V.add_(share.db_V.mul_(slope))
        self._begun = True

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(dW, db)"""
        if self.dW_VD is not None and not self._begun:
            self.dW_VD.zero_()
        return self.dW_VD, self.db_V


class _Call:
    """Inputs, logits buffer and gradients of one call. Gradients gather in C and are rounded once, at the end."""

    def __init__(
        self,
        passes: Passes,
        hidden_TD: Tensor,
        head: Head,
        labels_T: Tensor,
        ignored_T: Tensor | None,
        scorer: PairScorer,
        needs: Needs,
    ):
        self.passes = passes
        self.needs = needs
        self.hidden_TD = hidden_TD
        self.head = head
        self.labels_T = labels_T if ignored_T is None else labels_T.masked_fill(ignored_T, 0)
        self.ignored_T = ignored_T
        self.scorer = scorer
        self.lengths_S = scorer.cu_S1.diff()
        self.dtype = accumulation_dtype(hidden_TD.dtype)
        self.operand = operand_dtype(hidden_TD)
        self.buffer = hidden_TD.new_empty(0, dtype=self.dtype)
        self.dX_TD = None
        if needs.hidden:
            self.dX_TD = torch.empty(hidden_TD.shape, dtype=self.dtype, device=hidden_TD.device)
        self.of_head = _HeadGradient(passes, head, needs, self.dtype)
        self.stats: RunningStats | None = None
        self.total_T = hidden_TD.new_ones(hidden_TD.shape[0], dtype=self.dtype)

    def whole_pairs(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Pairs that fit the buffer: slopes are known before the gradients are formed."""
        offsets = chunk.offsets(self.scorer.offsets)
        rows = slice(offsets[0], offsets[-1])
        gradient_nV, logps_n, slope_n = self._log_prob_gradient(rows)
        lengths = self.lengths_S[2 * chunk.first_pair : 2 * (chunk.first_pair + chunk.num_pairs)]
        sums = sum_responses(logps_n, lengths)
        losses, slopes = self.scorer.score(sums, chunk.first_pair)
        if rows.start < rows.stop:
            slope_n *= slopes.repeat_interleave(lengths, output_size=rows.stop - rows.start)
            self._add_gradients(self.of_head, rows, gradient_nV, slope_n)
        return losses, sums

    def split_pair(self, chunk: Chunk, max_rows: int) -> tuple[Tensor, Tensor]:
        """One pair in several buffers: everything is gathered unscaled, per response, until the slopes are known."""
        sums, gathered = [], []
        bounds = itertools.pairwise(chunk.offsets(self.scorer.offsets))
        for response, (start, stop) in enumerate(bounds, start=2 * chunk.first_pair):
            of_head, logps = _HeadGradient(self.passes, self.head, self.needs, self.dtype), []
            for part in even_slices(stop - start, max_rows):
                rows = slice(start + part.start, start + part.stop)
                gradient_nV, logps_n, slope_n = self._log_prob_gradient(rows)
                self._add_gradients(of_head, rows, gradient_nV, slope_n)
                logps.append(logps_n)
            length = self.lengths_S[response : response + 1]
            sums.append(sum_responses(torch.cat([self.hidden_TD.new_zeros(0, dtype=self.dtype), *logps]), length))
            gathered.append((slice(start, stop), of_head))
        pair_sums = torch.cat(sums)
        losses, slopes = self.scorer.score(pair_sums, chunk.first_pair)
        for slope, (rows, of_head) in zip(slopes, gathered, strict=True):
            if self.dX_TD is not None:
                self.dX_TD[rows] *= slope
            self.of_head.add_scaled(of_head, slope)
        return losses, pair_sums

    def _log_prob_gradient(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(d log-prob / d (x W^T) [n, V] up to a factor a row, in the buffer; log-probs [n], times the weights of
        tokens; these factors [n], times the same)."""
        x_nD, labels_n = self.hidden_TD[rows].to(self.operand), self.labels_T[rows]
        n, V = x_nD.shape[0], self.head.weight_VD.shape[0]
        if self.buffer.numel() < n * V:
            self.buffer = self.buffer.new_empty(0)
            self.buffer = native.in_huge_pages(self.buffer.new_empty(n * V))
        z_nV = self.buffer[: n * V].view(n, V)
        for columns, W_vD in weight_blocks(self.head.weight_VD):
            self.passes.product_(z_nV[:, columns], x_nD, W_vD.T)
        found = self.passes.logits(z_nV, labels_n, self.head, self.stats, rows)
        self.total_T[rows] = found.total_n
        slope_n = torch.full_like(found.total_n, self.head.slope)
        if found.scale_n is not None:
            slope_n *= found.scale_n
        logps_n = found.logps_n
        if self.ignored_T is not None:
            logps_n.masked_fill_(self.ignored_T[rows], 0)
        if self.scorer.token_weights_T is not None:
            weights_n = self.scorer.token_weights_T[rows]
            logps_n, slope_n = logps_n * weights_n, slope_n * weights_n
        return z_nV, logps_n, slope_n

    def token_stats(self, used: Tensor | None, num_rows: int) -> Tensor | None:
        """[K, T] over all ``num_rows`` rows, of which ``used`` were computed; None where none are asked for."""
        if self.stats is None:
            return None
        stats_KT = self.stats.finish(self.total_T, self.labels_T, self.head.weight_VD.shape[0])
        if self.ignored_T is not None:
            stats_KT.masked_fill_(self.ignored_T, 0)
        return torch.stack([spread_rows(values_T, used, num_rows) for values_T in stats_KT])

    def _add_gradients(self, of_head: _HeadGradient, rows: slice, gradient_nV: Tensor, slope_n: Tensor) -> None:
        if self.ignored_T is not None:
            slope_n.masked_fill_(self.ignored_T[rows], 0)
        if self.dX_TD is not None:
            dX_nD = self.dX_TD[rows]
            for columns, W_vD in weight_blocks(self.head.weight_VD):
                gradient_nv = gradient_nV[:, columns].to(self.operand)
                self.passes.product_(dX_nD, gradient_nv, W_vD, accumulate=columns.start > 0)
            self.passes.scale_rows_(dX_nD, dX_nD, slope_n)
        of_head.add(gradient_nV, self.hidden_TD[rows], slope_n, self.operand)
