"""The paired loss by Triton kernels: chunks of whole pairs, three products.

Legend: T rows, D features, V vocabulary, n rows of a chunk, S responses, P pairs.

Per chunk: one product leaves exponentials in the compute dtype and fp32 log-probs -> one launch scores the pairs -> the
exponentials become gradients in place -> dX rows and a share of dW by the vendor's library. A pair that is too long for
a chunk has its slopes known only after all of its rows: its responses gather dW unscaled, in fp32 buffers of their own,
which are added with the slope at the end.

Workspace beyond the results: at most WORKSPACE_BYTES for a chunk, whose rows are chosen for that. The dW of a bfloat16
weight is rounded once where one chunk holds everything or where its sum in fp32 fits in half of the workspace; else it
is summed in place and rounded once a chunk, up to IN_PLACE_CHUNKS; beyond that an fp32 sum comes on top (4 V D bytes).
A pair of more rows than a chunk takes exponentials of its own size, and one that is split two fp32 buffers like dW.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dpo_kernels.chunks import Chunk, early_gradient_dtype, even_slices, plan_chunks
from dpo_kernels.head import Gradients, Head, Needs
from dpo_kernels.kernels import scale
from dpo_kernels.kernels.launch import MAX_BLOCK, TileLaunch, obstacle
from dpo_kernels.kernels.paired_loss import KERNEL_LOSSES, PairTerms, launch_pairs, loss_numbers
from dpo_kernels.kernels.products import add_product_
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_logps import RowScores, empty_exps, partial_width, score_rows
from dpo_kernels.kernels.token_stats import NUM_PARTIALS, TOKEN_STATS
from dpo_kernels.linear_dpo.interface import PairLosses, PairScorer, Want

WORKSPACE_BYTES = 2**30
"""Exponentials and statistics of a chunk: large enough that adding a share of dW costs little beside the products."""
LAUNCH_ROWS = 1024
"""Rows for whose sums of exponentials there is always room; whole tiles of rows."""
ROW_BYTES = 80
"""Numbers of a row that are not per column: log-prob, log-sum-exp, shift, slope, and merged statistics of tokens."""
IN_PLACE_CHUNKS = 4
"""Four roundings to bfloat16 have 1.4 to 1.6 times the error of one (shares that add up, shares that are independent),
which is small beside the error that gradients have from bfloat16 operands."""


LOSSES = KERNEL_LOSSES
"""Losses of pairs that the kernels compute."""
STATS = TOKEN_STATS
"""Token statistics that the kernels compute."""
scale_ = scale.scale_


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See ``dpo_kernels.linear_dpo.interface``."""
    return obstacle(device, dtype)


def forward(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, scorer: PairScorer, *, ignore_index: int, want: Want
) -> PairLosses:
    """See ``dpo_kernels.linear_dpo.interface``."""
    call = _Call(hidden_TD, head, labels_T, ignore_index, _pair_terms(scorer))
    call.set_token_weights(scorer.token_weights_T)
    call.token_stats = bool(want.stats)
    max_rows, chunks, sum_dtype = _plan(
        hidden_TD, head, scorer.offsets, need_weight=want.gradients.weight, token_stats=call.token_stats
    )
    # One buffer for all chunks: buffers of many sizes would leave holes in the allocator's memory.
    rows_held = _rows_held(chunks, scorer.offsets, max_rows)
    call.exps = empty_exps(hidden_TD[:rows_held], head.weight_VD.shape[0])
    call.launch_rows = _launch_rows(call, rows_held, sum_dtype)
    call.want_gradients(want.gradients, sum_dtype)
    losses, sums = [], []
    for chunk in chunks:
        offsets = chunk.offsets(scorer.offsets)
        if chunk.split:
            chunk_losses, chunk_sums = call.split_pair(chunk, offsets, max_rows)
        else:
            chunk_losses, chunk_sums = call.whole_pairs(chunk, offsets)
        losses.append(chunk_losses)
        sums.append(chunk_sums)
    stats_KT = None
    if want.stats:
        # Chunks go through the rows in order, and so do the blocks of each.
        found_KT = torch.cat(call.found_stats, dim=1)
        stats_KT = torch.stack([found_KT[STATS.index(name)] for name in want.stats])
    return PairLosses(torch.cat(losses), torch.cat(sums), call.gradients(), stats_KT)


def _bytes_of_row(hidden_TD: Tensor, weight_VD: Tensor, *, heavy: bool, token_stats: bool) -> tuple[int, int]:
    """What a row holds until its gradient is formed, and what only its launch holds beside that."""
    V = weight_VD.shape[0]
    width = partial_width(TileLaunch("linear_exps", hidden_TD, weight_VD, heavy=heavy), joined=not token_stats)
    columns = -(-V // MAX_BLOCK) * MAX_BLOCK
    # Of each tile a shift, which stays, and a sum, with statistics of tokens more numbers.
    plane = 4 * (columns // width)
    lasting = columns * hidden_TD.element_size() + plane + ROW_BYTES
    return lasting, plane * (1 + NUM_PARTIALS if token_stats else 1)


def chunk_rows(
    hidden_TD: Tensor, weight_VD: Tensor, *, heavy: bool, token_stats: bool = False, workspace: int = WORKSPACE_BYTES
) -> int:
    """Most rows of a chunk, unless a single pair has more: those whose exponentials and statistics fit `workspace`."""
    lasting, passing = _bytes_of_row(hidden_TD, weight_VD, heavy=heavy, token_stats=token_stats)
    rows = (workspace - LAUNCH_ROWS * passing) // lasting
    # Exponentials are padded to whole tiles of rows.
    return max(MAX_BLOCK, rows // MAX_BLOCK * MAX_BLOCK)


def _launch_rows(call: _Call, rows_held: int, sum_dtype: torch.dtype) -> int:
    """Rows of a launch, as a rule all of a chunk: what is left of the workspace holds their sums of exponentials."""
    weight_VD = call.head.weight_VD
    heavy = call.token_stats or call.head.softcap is not None
    lasting, passing = _bytes_of_row(call.hidden_TD, weight_VD, heavy=heavy, token_stats=call.token_stats)
    sum_bytes = 4 * weight_VD.numel() if sum_dtype != call.gradient_dtype else 0
    # A larger sum of dW comes on top of the workspace.
    padded_rows = -(-rows_held // MAX_BLOCK) * MAX_BLOCK
    left = WORKSPACE_BYTES - padded_rows * lasting - (sum_bytes if 2 * sum_bytes <= WORKSPACE_BYTES else 0)
    return max(LAUNCH_ROWS, left // passing // MAX_BLOCK * MAX_BLOCK)


def _plan(
    hidden_TD: Tensor, head: Head, cu_responses: list[int], *, need_weight: bool, token_stats: bool = False
) -> tuple[int, list[Chunk], torch.dtype]:
    """(most rows of a chunk, chunks, dtype in which dW is summed)."""
    # Splitting a pair costs two fp32 buffers of the size of dW: below their size its exponentials are the better deal.
    rows_of_pair = 8 * hidden_TD.shape[1] // hidden_TD.element_size()
    weight_VD = head.weight_VD
    heavy, dtype = token_stats or head.softcap is not None, early_gradient_dtype(hidden_TD.dtype)

    def rows_within(workspace: int) -> int:
        return chunk_rows(hidden_TD, weight_VD, heavy=heavy, token_stats=token_stats, workspace=workspace)

    max_rows = rows_within(WORKSPACE_BYTES)
    chunks = plan_chunks(cu_responses, max_rows, rows_of_pair)
    if not need_weight or dtype == torch.float32 or (len(chunks) == 1 and not chunks[0].split):
        return max_rows, chunks, dtype
    sum_bytes = 4 * weight_VD.numel()
    if 2 * sum_bytes <= WORKSPACE_BYTES:
        max_rows = rows_within(WORKSPACE_BYTES - sum_bytes)
        return max_rows, plan_chunks(cu_responses, max_rows, rows_of_pair), torch.float32
    in_place = len(chunks) <= IN_PLACE_CHUNKS and not any(chunk.split for chunk in chunks)
    return max_rows, chunks, dtype if in_place else torch.float32


def _rows_held(chunks: list[Chunk], cu_responses: list[int], max_rows: int) -> int:
    """Most rows whose exponentials are held at a time."""
    ends = cu_responses[::2]
    return max(max_rows if c.split else ends[c.first_pair + c.num_pairs] - ends[c.first_pair] for c in chunks)


def forward_workspace(hidden_TD: Tensor, weight_VD: Tensor, cu_responses: list[int], need_weight: bool) -> int:
    """Most bytes that ``forward`` holds beyond its inputs and results, without statistics of tokens."""
    max_rows, chunks, sum_dtype = _plan(hidden_TD, Head(weight_VD), cu_responses, need_weight=need_weight)
    rows = _rows_held(chunks, cu_responses, max_rows)
    lasting, passing = _bytes_of_row(hidden_TD, weight_VD, heavy=False, token_stats=False)
    size = -(-rows // MAX_BLOCK) * MAX_BLOCK * lasting
    # The sums of a launch take what is left of the workspace at most, or the least that a launch has.
    size += min(rows * passing, max(WORKSPACE_BYTES - size, LAUNCH_ROWS * passing))
    sums = int(sum_dtype != early_gradient_dtype(hidden_TD.dtype)) + 2 * any(chunk.split for chunk in chunks)
    return size + (sums * weight_VD.numel() * sum_dtype.itemsize if need_weight else 0)


def _pair_terms(scorer: PairScorer) -> PairTerms:
    """What the kernel needs of the scorer's data, in fp32."""

    def number(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(torch.float32).contiguous()

    mix = scorer.mix
    return PairTerms(
        names=tuple(loss_type.name for loss_type in mix.types),
        weights=mix.weights,
        ref_logps_S=number(scorer.ref_logps_S),
        lengths_S=number(scorer.lengths_S),
        mean_length=number(scorer.mean_length),
        scale_P=scorer.scale_P.to(torch.float32).contiguous(),
        margins_P=number(scorer.margins_P),
        cu_S1=scorer.cu_S1.to(torch.int32),
        **loss_numbers(scorer.options),
    )


class _Call:
    """Inputs, the buffer of exponentials and the gradients of one call."""

    def __init__(
        self,
        hidden_TD: Tensor,
        head: Head,
        labels_T: Tensor,
        ignore_index: int,
        terms: PairTerms,
    ):
        self.hidden_TD = hidden_TD
        self.head = head
        self.labels_T = labels_T
        self.ignore_index = ignore_index
        self.terms = terms
        # Gradients are formed in the compute dtype: float16 loses small ones and large ones that are not of order 1.
        # What a gradient of the logits and the sums over chunks are multiples of; it may rise from chunk to chunk.
        self.unit = hidden_TD.new_zeros((), dtype=torch.float32) if hidden_TD.dtype == torch.float16 else None
        self.gradient_dtype = early_gradient_dtype(hidden_TD.dtype)
        self.exps = hidden_TD.new_empty(0, 0)
        self.token_stats = False
        self.launch_rows = LAUNCH_ROWS
        self.found_stats: list[Tensor] = []
        self.dX_TD: Tensor | None = None
        self.dW_VD: Tensor | None = None
        self.db_V: Tensor | None = None
        self.dW_empty = True
        self.token_weights_T: Tensor | None = None
        self.relative_T: Tensor | None = None
        self.largest_weight: Tensor | float = 1.0

    def set_token_weights(self, weights_T: Tensor | None) -> None:
        """Weights as numbers of at most 1 and a factor of them all, which goes with the slopes: float16 has room for
        neither large nor small ones."""
        if weights_T is None:
            return
        self.token_weights_T = weights_T
        self.largest_weight = weights_T.abs().amax()
        self.relative_T = weights_T / torch.where(self.largest_weight > 0, self.largest_weight, 1.0)

    def want_gradients(self, needs: Needs, sum_dtype: torch.dtype) -> None:
        weight_VD = self.head.weight_VD
        if needs.hidden:
            self.dX_TD = self.hidden_TD.new_empty(self.hidden_TD.shape, dtype=self.gradient_dtype)
        if needs.weight:
            self.dW_VD = weight_VD.new_empty(weight_VD.shape, dtype=sum_dtype)
        if needs.bias:
            self.db_V = weight_VD.new_zeros(weight_VD.shape[0], dtype=torch.float32)

    def gradients(self) -> Gradients:
        if self.dW_VD is not None and self.dW_empty:
            self.dW_VD.zero_()
        if self.unit is not None:
            for total in (self.dW_VD, self.db_V):
                if total is not None:
                    total.mul_(self.unit)
        return Gradients(*map(self._finish, (self.dX_TD, self.dW_VD, self.db_V)))

    def _finish(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.to(self.gradient_dtype)

    def whole_pairs(self, chunk: Chunk, offsets: list[int]) -> tuple[Tensor, Tensor]:
        """Slopes are known before the gradients are formed."""
        rows = slice(offsets[0], offsets[-1])
        scored = self._score_blocks(rows)
        logps_n = self._log_probs(scored, rows)
        scores = launch_pairs(
            logps_n, self.terms, first_pair=chunk.first_pair, num_pairs=chunk.num_pairs, first_row=rows.start
        )
        if scored:
            grad_n = scores.grad_T if self.token_weights_T is None else scores.grad_T * self.token_weights_T[rows]
            if self.unit is not None:
                grad_n = grad_n / self._raise_unit(scores.slopes_S * self.largest_weight)
            gradient_nV = self._products_gradient(rows, grad_n, scored)
            if self.dX_TD is not None:
                add_product_(self.dX_TD[rows], gradient_nV, self.head.weight_VD, first=True)
                if self.unit is not None:
                    self.dX_TD[rows] *= self.unit
            if self.dW_VD is not None:
                add_product_(self.dW_VD, gradient_nV.T, self.hidden_TD[rows], first=self.dW_empty)
                self.dW_empty = False
            if self.db_V is not None:
                self.db_V += gradient_nV.sum(dim=0, dtype=torch.float32)
        return scores.losses_P, scores.logps_S

    def _raise_unit(self, slopes_S: Tensor) -> Tensor:
        """Raise the unit to the largest of these slopes, bring the sums so far to it, and return it, or 1 for 0."""
        assert self.unit is not None
        # A pair that is not finite must not take others with it.
        largest = (slopes_S * self._logit_slope()).abs().nan_to_num(nan=0.0, posinf=0.0).amax()
        old, self.unit = self.unit, torch.maximum(self.unit, largest)
        divisor = torch.where(self.unit > 0, self.unit, 1.0)
        if self.dW_VD is not None and not self.dW_empty:
            self.dW_VD.mul_(old / divisor)
        if self.db_V is not None:
            self.db_V.mul_(old / divisor)
        return divisor

    def _logit_slope(self) -> float:
        """Slope of the final logits without their softcap; 1 where it is 0, which leaves no gradient to form."""
        return abs(self.head.slope) or 1.0

    def split_pair(self, chunk: Chunk, offsets: list[int], max_rows: int) -> tuple[Tensor, Tensor]:
        """One pair in several chunks: dW and db gather per response and unscaled until the slopes are known."""
        logps, shares = [], []
        # In float16 even the slope of the logits has to wait, as it may leave no room for the rest.
        waiting = 1.0 if self.unit is None else self._logit_slope()
        for start, stop in itertools.pairwise(offsets):
            dW_VD = None if self.dW_VD is None else torch.empty_like(self.dW_VD)
            db_V = None if self.db_V is None else torch.zeros_like(self.db_V)
            for part in even_slices(stop - start, max_rows):
                rows = slice(start + part.start, start + part.stop)
                scored = self._score_blocks(rows)
                logps.append(self._log_probs(scored, rows))
                grad_n = torch.full_like(logps[-1], 1 / waiting)
                grad_n = grad_n if self.relative_T is None else grad_n * self.relative_T[rows]
                gradient_nV = self._products_gradient(rows, grad_n, scored)
                # Given back before the next ones are asked for.
                del scored
                if self.dX_TD is not None:
                    add_product_(self.dX_TD[rows], gradient_nV, self.head.weight_VD, first=True)
                if dW_VD is not None:
                    add_product_(dW_VD, gradient_nV.T, self.hidden_TD[rows], first=part.start == 0)
                if db_V is not None:
                    db_V += gradient_nV.sum(dim=0, dtype=torch.float32)
            shares.append((slice(start, stop), dW_VD, db_V))
        scores = launch_pairs(
            torch.cat(logps), self.terms, first_pair=chunk.first_pair, num_pairs=1, first_row=offsets[0]
        )
        weighted_S = scores.slopes_S * self.largest_weight
        slopes_S = weighted_S * waiting
        in_units_S = slopes_S if self.unit is None else slopes_S / self._raise_unit(weighted_S)
        for i, (rows, dW_VD, db_V) in enumerate(shares):
            if rows.start == rows.stop:
                continue
            if self.dX_TD is not None:
                self.dX_TD[rows] *= slopes_S[i]
            slope = in_units_S[i]
            if self.dW_VD is not None and dW_VD is not None:
                self.dW_VD = dW_VD.mul_(slope) if self.dW_empty else self.dW_VD.addcmul_(dW_VD, slope)
                self.dW_empty = False
            if self.db_V is not None and db_V is not None:
                self.db_V.addcmul_(db_V, slope)
        return scores.losses_P, scores.logps_S

    def _score_blocks(self, rows: slice) -> list[RowScores]:
        """Log-probs of some rows, launch by launch; their exponentials stay in the buffer."""
        hidden_nD, labels_n = self.hidden_TD[rows], self.labels_T[rows]
        scored = [
            score_rows(
                hidden_nD[block],
                self.head,
                labels_n[block],
                ignore_index=self.ignore_index,
                exps=self.exps[block.start :],
                token_stats=self.token_stats,
            )
            for block in self._blocks(hidden_nD.shape[0])
        ]
        self.found_stats += [block.token_stats_KT for block in scored if block.token_stats_KT is not None]
        return scored

    def _log_probs(self, scored: list[RowScores], rows: slice) -> Tensor:
        """Of these rows, times the weights of tokens."""
        logps_n = torch.cat([self.hidden_TD.new_empty(0, dtype=torch.float32), *(block.logps_T for block in scored)])
        return logps_n if self.token_weights_T is None else logps_n * self.token_weights_T[rows]

    def _products_gradient(self, rows: slice, grad_n: Tensor, scored: list[RowScores]) -> Tensor:
        labels_n = self.labels_T[rows]
        for block, block_scores in zip(self._blocks(labels_n.shape[0]), scored, strict=True):
            softmax_grad_(
                self.exps[block.start :],
                grad_n[block],
                self.head,
                labels_n[block],
                block_scores,
                ignore_index=self.ignore_index,
            )
        return self.exps[: labels_n.shape[0], : self.head.weight_VD.shape[0]]

    def _blocks(self, num_rows: int) -> list[slice]:
        starts = range(0, num_rows, self.launch_rows)
        return [slice(start, min(num_rows, start + self.launch_rows)) for start in starts]
