"""What a pass over groups of responses found, and its means.

Legend: G groups (or pairs of groups).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..packing import PackedBatch


class RowTerms(NamedTuple):
    """Which losses some groups add, and the numbers that their rows give them."""

    pairs_P2: Tensor | None = None
    """int64, (chosen, rejected) responses of each; None when groups are pairs or rankings."""
    weights_P: Tensor | None = None
    """fp32, what each is multiplied by; None for 1."""
    margins_P: Tensor | None = None
    """fp32, by how much each reward margin is to be exceeded; None for 0."""

    @classmethod
    def of(cls, batch: PackedBatch) -> RowTerms:
        return cls(batch.pairs_P2, batch.pair_weights_P, batch.margins_P)


PLAIN_TERMS = RowTerms()
"""Pairs or rankings, all alike."""


class Scored(NamedTuple):
    """Groups of responses, scored. Only ``losses`` may carry gradients."""

    losses: Tensor
    """[G]; for losses that couple pairs, quantiles of the batch instead of groups."""
    chosen_rewards: Tensor
    """[G]: of the best response."""
    rejected_rewards: Tensor
    """[G]: of the rejected response; with more than two, the mean of all but the best."""
    accuracies: Tensor
    """[G]: share of the ordered pairs of responses whose rewards are in the right order; a tie is wrong."""
    chosen_logps: Tensor
    rejected_logps: Tensor
    tokens: Tensor
    """float64 [G, 6], sums over the tokens of a group that ``_token_means`` divides; [G, 0] when not asked for."""

    def means(self) -> Tensor:
        """[7] in the order of ``metrics.PREFERENCE_NAMES``; with ``tokens`` [11], ``TOKEN_NAMES`` last."""
        return torch.cat([self.columns().mean(1), _token_means(self.tokens.sum(0))])

    def step_means(self, num_terms: int) -> Tensor:
        """``means`` of a step of ``num_terms`` losses, this process's among them; the same on every rank."""
        columns = self.columns()
        sums = distributed.sum_over_ranks(torch.cat([columns.sum(1), self.tokens.sum(0)]))
        return torch.cat([sums[: len(columns)] / num_terms, _token_means(sums[len(columns) :])])

    @property
    def device(self) -> torch.device:
        return self.chosen_logps.device

    def columns(self) -> Tensor:
        """float64 [7, G] in the order of ``metrics.PREFERENCE_NAMES``, detached."""
        margins = self.chosen_rewards - self.rejected_rewards
        columns = (self.losses, self.chosen_rewards, self.rejected_rewards, self.accuracies, margins)
        return torch.stack([c.detach() for c in (*columns, self.chosen_logps, self.rejected_logps)]).double()


def _token_means(sums: Tensor) -> Tensor:
    """The values of ``metrics.TOKEN_NAMES`` from the sum over groups; nothing from nothing."""
    if not len(sums):
        return sums
    chosen, rejected = sums[4], sums[5]
    return sums[:4] / torch.stack([chosen, rejected, chosen + rejected, chosen]).clamp(min=1)
