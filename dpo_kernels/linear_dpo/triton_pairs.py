"""The paired loss by Triton kernels: chunks of whole pairs, three products.

Legend: T rows, D features, V vocabulary, n rows of a chunk, S responses, P pairs.

Per chunk: one product leaves exponentials in the compute dtype and fp32 log-probs -> one launch scores the pairs -> the
exponentials become gradients in place -> dX rows and a share of dW by the vendor's library. A pair that is too long for
a chunk has its slopes known only after all of its rows: its responses gather dW unscaled, in fp32 buffers of their own,
which are added with the slope at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.chunks import Chunk, early_gradient_dtype, even_slices, plan_chunks
from dpo_kernels.kernels.launch import MAX_BLOCK, HeadOptions, obstacle
from dpo_kernels.kernels.paired_loss import PairTerms, launch_pairs
from dpo_kernels.kernels.products import add_product_
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_logps import LinearStats, empty_exps, linear_stats

CHUNK_BYTES = 2**30
"""Size of the exponentials of a chunk: large enough that adding a share of dW costs little beside the products."""


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """See ``dpo_kernels.linear_dpo.ops``."""
    return obstacle(device_type, dtype)


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    cu_responses: list[int],
    score_pairs: Any,
    bias_V: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """See ``dpo_kernels.linear_dpo.ops``."""
    max_rows = chunk_rows(hidden_TD, weight_VD)
    # Splitting a pair costs two fp32 buffers of the size of dW: below their size its exponentials are the better deal.
    chunks = plan_chunks(cu_responses, max_rows, 8 * hidden_TD.shape[1] // hidden_TD.element_size())
    options = HeadOptions(bias_V=bias_V, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    call = _Call(
        hidden_TD, weight_VD, labels_T, options, ignore_index, _pair_terms(score_pairs, cu_responses, hidden_TD.device)
    )
    call.want_gradients(need_hidden, need_weight, need_bias, chunks)
    losses, sums = [], []
    for chunk in chunks:
        offsets = cu_responses[2 * chunk.first_pair : 2 * (chunk.first_pair + chunk.num_pairs) + 1]
        if chunk.split:
            chunk_losses, chunk_sums = call.split_pair(chunk, offsets, max_rows)
        else:
            chunk_losses, chunk_sums = call.whole_pairs(chunk, offsets)
        losses.append(chunk_losses)
        sums.append(chunk_sums)
    return torch.cat(losses), torch.cat(sums), *call.gradients()


def chunk_rows(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """Most rows of a chunk, unless a single pair has more."""
    row_bytes = -(-weight_VD.shape[0] // MAX_BLOCK) * MAX_BLOCK * hidden_TD.element_size()
    return max(1, CHUNK_BYTES // row_bytes)


def _pair_terms(score_pairs: Any, cu_responses: list[int], device: torch.device) -> PairTerms:
    """What the kernel needs of the scorer's own data, in fp32."""

    def number(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(torch.float32).contiguous()

    mix = score_pairs.mix
    cu_S1 = torch.tensor(cu_responses, dtype=torch.int32).to(device, non_blocking=True)
    return PairTerms(
        names=tuple(loss_type.name for loss_type in mix.types),
        weights=mix.weights,
        per_token_reward=all(loss_type.per_token_reward for loss_type in mix.types),
        ref_logps_S=number(score_pairs.ref_logps_S),
        lengths_S=number(score_pairs.lengths_S),
        mean_length=number(score_pairs.mean_length),
        scale_P=score_pairs.scale_P.to(torch.float32).contiguous(),
        cu_S1=cu_S1,
        **score_pairs.options._asdict(),
    )


class _Call:
    """Inputs, the buffer of exponentials and the gradients of one call."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        options: HeadOptions,
        ignore_index: int,
        terms: PairTerms,
    ):
        self.hidden_TD = hidden_TD
        self.weight_VD = weight_VD
        self.labels_T = labels_T
        self.options = options
        self.ignore_index = ignore_index
        # Gradients are formed in the compute dtype: in float16 the small ones would vanish were they not of order 1.
        self.unit: Tensor | None = None
        if hidden_TD.dtype == torch.float16:
            largest = terms.scale_P.abs().max()
            self.unit = torch.where(largest > 0, largest, 1.0)
            terms = terms._replace(scale_P=terms.scale_P / self.unit)
        self.terms = terms
        self.gradient_dtype = early_gradient_dtype(hidden_TD.dtype)
        self.exps = hidden_TD.new_empty(0, 0)
        self.dX_TD: Tensor | None = None
        self.dW_VD: Tensor | None = None
        self.db_V: Tensor | None = None
        self.dW_empty = True

    def want_gradients(self, hidden: bool, weight: bool, bias: bool, chunks: Sequence[Chunk]) -> None:
        self.dX_TD = self.hidden_TD.new_empty(self.hidden_TD.shape, dtype=self.gradient_dtype) if hidden else None
        if weight:
            # Products sum in fp32 whatever they return, so that one or two need no buffer for the sum.
            in_place = len(chunks) <= 2 and not any(chunk.split for chunk in chunks)
            dtype = self.gradient_dtype if in_place else torch.float32
            self.dW_VD = self.weight_VD.new_empty(self.weight_VD.shape, dtype=dtype)
        if bias:
            self.db_V = self.weight_VD.new_zeros(self.weight_VD.shape[0], dtype=torch.float32)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.dW_VD is not None and self.dW_empty:
            self.dW_VD.zero_()
        dX_TD, dW_VD, db_V = map(self._finish, (self.dX_TD, self.dW_VD, self.db_V))
        return dX_TD, dW_VD, db_V

    def _finish(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        if self.unit is not None:
            gradient.mul_(self.unit)
        return gradient.to(self.gradient_dtype)

    def whole_pairs(self, chunk: Chunk, offsets: list[int]) -> tuple[Tensor, Tensor]:
        """Slopes are known before the gradients are formed."""
        rows = slice(offsets[0], offsets[-1])
        stats = self._stats(rows) if rows.start < rows.stop else None
        logps_n = self.hidden_TD.new_empty(0, dtype=torch.float32) if stats is None else stats.logps_N
        scores = launch_pairs(
            logps_n, self.terms, first_pair=chunk.first_pair, num_pairs=chunk.num_pairs, first_row=rows.start
        )
        if stats is not None:
            gradient_nV = self._products_gradient(rows, scores.grad_N, stats)
            if self.dX_TD is not None:
                add_product_(self.dX_TD[rows], gradient_nV, self.weight_VD, first=True)
            if self.dW_VD is not None:
                add_product_(self.dW_VD, gradient_nV.T, self.hidden_TD[rows], first=self.dW_empty)
                self.dW_empty = False
            if self.db_V is not None:
                self.db_V += gradient_nV.sum(dim=0, dtype=torch.float32)
        return scores.losses_P, scores.logps_S

    def split_pair(self, chunk: Chunk, offsets: list[int], max_rows: int) -> tuple[Tensor, Tensor]:
        """One pair in several chunks: dW and db gather per response and unscaled until the slopes are known."""
        logps, shares = [], []
        for start, stop in itertools.pairwise(offsets):
            dW_VD = None if self.dW_VD is None else torch.empty_like(self.dW_VD)
            db_V = None if self.db_V is None else torch.zeros_like(self.db_V)
            for part in even_slices(stop - start, max_rows):
                rows = slice(start + part.start, start + part.stop)
                stats = self._stats(rows)
                logps.append(stats.logps_N)
                gradient_nV = self._products_gradient(rows, torch.ones_like(stats.logps_N), stats)
                if self.dX_TD is not None:
                    add_product_(self.dX_TD[rows], gradient_nV, self.weight_VD, first=True)
                if dW_VD is not None:
                    add_product_(dW_VD, gradient_nV.T, self.hidden_TD[rows], first=part.start == 0)
                if db_V is not None:
                    db_V += gradient_nV.sum(dim=0, dtype=torch.float32)
            shares.append((slice(start, stop), dW_VD, db_V))
        scores = launch_pairs(
            torch.cat(logps), self.terms, first_pair=chunk.first_pair, num_pairs=1, first_row=offsets[0]
        )
        for slope, (rows, dW_VD, db_V) in zip(scores.slopes_S, shares, strict=True):
            if rows.start == rows.stop:
                continue
            if self.dX_TD is not None:
                self.dX_TD[rows] *= slope
            if self.dW_VD is not None and dW_VD is not None:
                self.dW_VD = dW_VD.mul_(slope) if self.dW_empty else self.dW_VD.addcmul_(dW_VD, slope)
                self.dW_empty = False
            if self.db_V is not None and db_V is not None:
                self.db_V.addcmul_(db_V, slope)
        return scores.losses_P, scores.logps_S

    def _stats(self, rows: slice) -> LinearStats:
        """Log-probs of some rows; their exponentials stay in the buffer."""
        hidden_nD = self.hidden_TD[rows]
        if self.exps.shape[0] < hidden_nD.shape[0]:
            # The old buffer is given back before the new one is asked for.
            self.exps = self.exps.new_empty(0, 0)
            self.exps = empty_exps(hidden_nD, self.weight_VD.shape[0])
        return linear_stats(
            hidden_nD,
            self.weight_VD,
            self.labels_T[rows],
            options=self.options,
            ignore_index=self.ignore_index,
            exps=self.exps,
        )

    def _products_gradient(self, rows: slice, grad_n: Tensor, stats: LinearStats) -> Tensor:
        return softmax_grad_(
            self.exps,
            grad_n,
            self.labels_T[rows],
            stats,
            V=self.weight_VD.shape[0],
            ignore_index=self.ignore_index,
            options=self.options,
        )
