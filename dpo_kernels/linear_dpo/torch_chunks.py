"""The paired loss by chunks of whole pairs in plain torch: three products, one logits buffer.

Legend: T rows, D features, V vocabulary, n rows of a chunk, S responses, P pairs, C the accumulation dtype.

Per chunk: logits -> (onehot - softmax) in the same buffer, with the log-probs as a by-product -> log-prob sums ->
slopes from the loss table -> dX rows and a share of dW. The slopes of a pair that is too long for the buffer are known
only after all of its rows: its responses gather dW unscaled in buffers of their own, added with the slope at the end.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dpo_kernels.chunks import (
    BUFFER_BYTES,
    CAST_BYTES,
    Chunk,
    accumulation_dtype,
    add_at_,
    early_gradient_dtype,
    even_slices,
    ignored_rows,
    logits_,
    operand_dtype,
    plan_chunks,
    product_,
    row_blocks,
    spread_rows,
    sum_responses,
    used_rows,
    weight_blocks,
)
from dpo_kernels.head import Gradients, Head, Needs
from dpo_kernels.linear_dpo.interface import PairLosses, PairScorer, Want
from dpo_kernels.linear_logps.stats import RunningStats


def forward(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, scorer: PairScorer, *, ignore_index: int, want: Want
) -> PairLosses:
    """See ``dpo_kernels.linear_dpo.interface``."""
    T = hidden_TD.shape[0]
    ignored_T = ignored_rows(labels_T, ignore_index)
    used = used_rows(ignored_T)
    if used is not None:
        cu_S1 = torch.searchsorted(used, scorer.cu_S1)
        scorer = scorer._replace(cu_S1=cu_S1, offsets=cu_S1.tolist())
        hidden_TD, labels_T, ignored_T = hidden_TD[used], labels_T[used], None
    call = _Call(hidden_TD, head, labels_T, ignored_T, scorer)
    call.want_gradients(want.gradients)
    if want.stats:
        call.stats = RunningStats(want.stats, hidden_TD)
    losses, sums = [], []
    chunks, max_rows = _chunks(scorer.offsets, head.weight_VD, call.dtype)
    for chunk in chunks:
        chunk_losses, chunk_sums = call.split_pair(chunk, max_rows) if chunk.split else call.whole_pairs(chunk)
        losses.append(chunk_losses)
        sums.append(chunk_sums)
    dX_TD, dW_VD, db_V = call.dX_TD, call.dW_VD, call.db_V
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


def forward_workspace(hidden_TD: Tensor, weight_VD: Tensor, cu_responses: list[int], need_weight: bool) -> int:
    """Most bytes that ``forward`` holds beyond its inputs and results, from shapes and dtypes alone; without statistics
    of tokens, which take a second block of exponentials: cached rows on the CPU, a whole chunk of them on a GPU."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    dtype, operand = accumulation_dtype(hidden_TD.dtype), operand_dtype(hidden_TD)
    chunks, max_rows = _chunks(cu_responses, weight_VD, dtype)
    ends = cu_responses[::2]
    rows = max(max_rows if c.split else ends[c.first_pair + c.num_pairs] - ends[c.first_pair] for c in chunks)
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


class _Call:
    """Inputs, logits buffer and gradients of one call. Gradients gather in C and are rounded once, at the end."""

    def __init__(self, hidden_TD: Tensor, head: Head, labels_T: Tensor, ignored_T: Tensor | None, scorer: PairScorer):
        self.hidden_TD = hidden_TD
        self.head = head
        self.labels_T = labels_T if ignored_T is None else labels_T.masked_fill(ignored_T, 0)
        self.ignored_T = ignored_T
        self.scorer = scorer
        self.lengths_S = scorer.cu_S1.diff()
        self.dtype = accumulation_dtype(hidden_TD.dtype)
        self.operand = operand_dtype(hidden_TD)
        self.buffer = hidden_TD.new_empty(0, dtype=self.dtype)
        self.dX_TD: Tensor | None = None
        self.dW_VD: Tensor | None = None
        self.db_V: Tensor | None = None
        self.stats: RunningStats | None = None
        self.total_T = hidden_TD.new_ones(hidden_TD.shape[0], dtype=self.dtype)

    def want_gradients(self, needs: Needs) -> None:
        if needs.hidden:
            self.dX_TD = torch.empty(self.hidden_TD.shape, dtype=self.dtype, device=self.hidden_TD.device)
        if needs.weight:
            self.dW_VD = self._zeros(self.head.weight_VD)
        if needs.bias and self.head.bias_V is not None:
            self.db_V = self._zeros(self.head.bias_V)

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.dtype, device=like.device)

    def whole_pairs(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Pairs that fit the buffer: slopes are known before the gradients are formed."""
        offsets = chunk.offsets(self.scorer.offsets)
        rows = slice(offsets[0], offsets[-1])
        gradient_nV, logps_n = self._log_prob_gradient(rows)
        lengths = self.lengths_S[2 * chunk.first_pair : 2 * (chunk.first_pair + chunk.num_pairs)]
        sums = sum_responses(logps_n, lengths)
        losses, slopes = self.scorer.score(sums, chunk.first_pair)
        if rows.start < rows.stop:
            slope_n = slopes.repeat_interleave(lengths, output_size=rows.stop - rows.start) * self.head.slope
            if self.ignored_T is not None:
                slope_n.masked_fill_(self.ignored_T[rows], 0)
            self._add_input(rows, gradient_nV, slope_n)
            self._add_head(self.dW_VD, self.db_V, rows, gradient_nV, slope_n)
        return losses, sums

    def split_pair(self, chunk: Chunk, max_rows: int) -> tuple[Tensor, Tensor]:
        """One pair in several buffers: everything is gathered unscaled, per response, until the slopes are known."""
        sums, gathered = [], []
        bounds = itertools.pairwise(chunk.offsets(self.scorer.offsets))
        for response, (start, stop) in enumerate(bounds, start=2 * chunk.first_pair):
            dW_VD = None if self.dW_VD is None else self._zeros(self.dW_VD)
            db_V = None if self.db_V is None else self._zeros(self.db_V)
            logps = []
            for part in even_slices(stop - start, max_rows):
                rows = slice(start + part.start, start + part.stop)
                gradient_nV, logps_n = self._log_prob_gradient(rows)
                ones_n = torch.full_like(logps_n, self.head.slope)
                if self.ignored_T is not None:
                    ones_n.masked_fill_(self.ignored_T[rows], 0)
                self._add_input(rows, gradient_nV, ones_n)
                self._add_head(dW_VD, db_V, rows, gradient_nV, ones_n)
                logps.append(logps_n)
            length = self.lengths_S[response : response + 1]
            sums.append(sum_responses(torch.cat([self.hidden_TD.new_zeros(0, dtype=self.dtype), *logps]), length))
            gathered.append((slice(start, stop), dW_VD, db_V))
        pair_sums = torch.cat(sums)
        losses, slopes = self.scorer.score(pair_sums, chunk.first_pair)
        for slope, (rows, dW_VD, db_V) in zip(slopes, gathered, strict=True):
            if self.dX_TD is not None:
                self.dX_TD[rows] *= slope
            for total, share in ((self.dW_VD, dW_VD), (self.db_V, db_V)):
                if total is not None and share is not None:
                    total.add_(share.mul_(slope))
        return losses, pair_sums

    def _log_prob_gradient(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(d log-prob / d logits [n, V] up to ``Head.slope``, in the buffer; log-probs [n])."""
        x_nD, labels_n = self.hidden_TD[rows].to(self.operand), self.labels_T[rows]
        n, V = x_nD.shape[0], self.head.weight_VD.shape[0]
        if self.buffer.numel() < n * V:
            self.buffer = self.buffer.new_empty(0)
            self.buffer = self.buffer.new_empty(n * V)
        z_nV = self.buffer[: n * V].view(n, V)
        for columns, W_vD in weight_blocks(self.head.weight_VD):
            product_(z_nV[:, columns], x_nD, W_vD.T)
        logps_n = z_nV.new_empty(n)
        for block in row_blocks(z_nV):
            block_T = slice(rows.start + block.start, rows.start + block.stop)
            logps_n[block], self.total_T[block_T] = _log_prob_gradient_(
                z_nV[block], labels_n[block], self.head, self.stats, block_T
            )
        if self.ignored_T is not None:
            logps_n.masked_fill_(self.ignored_T[rows], 0)
        return z_nV, logps_n

    def token_stats(self, used: Tensor | None, num_rows: int) -> Tensor | None:
        """[K, T] over all ``num_rows`` rows, of which ``used`` were computed; None where none are asked for."""
        if self.stats is None:
            return None
        stats_KT = self.stats.finish(self.total_T, self.labels_T, self.head.weight_VD.shape[0])
        if self.ignored_T is not None:
            stats_KT.masked_fill_(self.ignored_T, 0)
        return torch.stack([spread_rows(values_T, used, num_rows) for values_T in stats_KT])

    def _add_input(self, rows: slice, gradient_nV: Tensor, slope_n: Tensor) -> None:
        if self.dX_TD is None:
            return
        dX_nD = self.dX_TD[rows]
        for columns, W_vD in weight_blocks(self.head.weight_VD):
            product_(dX_nD, gradient_nV[:, columns].to(self.operand), W_vD, accumulate=columns.start > 0)
        dX_nD.mul_(slope_n.unsqueeze(1))

    def _add_head(
        self, dW_VD: Tensor | None, db_V: Tensor | None, rows: slice, gradient_nV: Tensor, slope_n: Tensor
    ) -> None:
        if dW_VD is not None:
            # The slope goes into the small factor of the product.
            x_nD = (self.hidden_TD[rows] * slope_n.unsqueeze(1)).to(self.operand)
            product_(dW_VD, gradient_nV.T.to(self.operand), x_nD, accumulate=True)
        if db_V is not None:
            db_V.addmv_(gradient_nV.T, slope_n)


def _log_prob_gradient_(
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
