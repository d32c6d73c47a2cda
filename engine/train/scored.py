"""What a pass over groups of responses found, and its means.

Legend: G groups (or pairs of groups).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import mesh
from ..packing import PackedBatch


class RowTerms(NamedTuple):
    """Which losses some groups add, and the numbers that their rows give them."""

    pairs_P2: Tensor | None = None
    """int64, (chosen, rejected) responses of each; None when groups are pairs or rankings."""
    weights_P: Tensor | None = None
    """fp32, what each is multiplied by; None for 1."""
    margins_P: Tensor | None = None
    """fp32, by how much each reward margin is to be exceeded; None for 0."""
    desirable_G: Tensor | None = None
    """bool, the labels of unpaired rows; None where groups are others."""

    @classmethod
    def of(cls, batch: PackedBatch) -> RowTerms:
        return cls(batch.pairs_P2, batch.pair_weights_P, batch.margins_P)


PLAIN_TERMS = RowTerms()
"""Pairs or rankings, all alike."""


class Scored(NamedTuple):
    """Groups of responses, scored. Only ``losses`` may carry gradients.

    An unpaired row has one response, whose reward and log-prob are those of either side; ``columns`` takes the one that
    its label says.
    """

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
    desirable: Tensor | None = None
    """bool [G]: the labels of unpaired rows."""
    divergence: Tensor | None = None
    """A number: what KTO measures rewards from."""

    def means(self) -> Tensor:
        """[7] in the order of ``metrics.PREFERENCE_NAMES``; with ``tokens`` [11], ``TOKEN_NAMES`` last. NaN where no
        row has a label."""
        return self._means(torch.cat([self.columns().sum(1), self.tokens.sum(0)]), len(self.losses))

    def step_means(self, num_terms: int) -> Tensor:
        """``means`` of a step of ``num_terms`` losses, this process's among them; the same on every rank."""
        sums = mesh.sum_over_packs(torch.cat([self.columns().sum(1), self.tokens.sum(0)]))
        return self._means(sums, num_terms)

    def _means(self, sums: Tensor, num_terms: int) -> Tensor:
        size = len(sums) - self.tokens.shape[1]
        return torch.cat([means_of(sums[:size], num_terms), _token_means(sums[size:])])

    def further(self, num_terms: int, *, whole: bool = False) -> dict[str, Tensor]:
        """What a step of unpaired rows has beside its means, by name; nothing of others.

        Args:
            whole: all of it is here, on every rank.
        """
        if self.desirable is None:
            return {}
        good = self.desirable.double().sum()
        good = good if whole else mesh.sum_over_packs(good)
        counts = {"count/chosen": good, "count/rejected": num_terms - good}
        return counts if self.divergence is None else {"kl": self.divergence, **counts}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those with a row for each group."""
        return tuple(t for name, t in self._asdict().items() if name != "divergence" and t is not None)

    def map_columns(self, change: Callable[[Tensor], Tensor]) -> Scored:
        """The same with ``change`` of each of ``tensors``, in their order."""
        names = [name for name, t in self._asdict().items() if name != "divergence" and t is not None]
        return self._replace(**{name: change(getattr(self, name)) for name in names})

    @property
    def device(self) -> torch.device:
        return self.chosen_logps.device

    def columns(self) -> Tensor:
        """float64 [7, G] in the order of ``metrics.PREFERENCE_NAMES``, detached; of unpaired rows [8, G], with 0 for
        the side that a row is not of, and its label last."""
        margins = self.chosen_rewards - self.rejected_rewards
        columns = (self.losses, self.chosen_rewards, self.rejected_rewards, self.accuracies, margins)
        found = torch.stack([c.detach() for c in (*columns, self.chosen_logps, self.rejected_logps)]).double()
        if self.desirable is None:
            return found
        good, all_rows = self.desirable, torch.ones_like(self.desirable)
        counted = torch.stack([all_rows, good, ~good, all_rows, all_rows, good, ~good])
        return torch.cat([found.where(counted, torch.zeros_like(found)), good.double()[None]])


def means_of(sums: Tensor, rows: Tensor | float) -> Tensor:
    """[..., 7]: the means of ``Scored.columns`` from their sums [..., 7], or [..., 8] of unpaired rows: over those of a
    label, and NaN where there is none.

    Args:
        rows: [...], how many there are.
    """
    total = torch.zeros_like(sums[..., 0]) + rows
    if sums.shape[-1] == 7:
        return sums / total[..., None]
    good = sums[..., 7]
    means = sums[..., :7] / torch.stack([total, good, total - good, total, total, good, total - good], -1)
    return torch.cat([means[..., :4], (means[..., 1] - means[..., 2])[..., None], means[..., 5:]], -1)


def _token_means(sums: Tensor) -> Tensor:
    """The values of ``metrics.TOKEN_NAMES`` from the sum over groups; NaN without a token, nothing from nothing."""
    if not len(sums):
        return sums
    chosen, rejected = sums[4], sums[5]
    return sums[:4] / torch.stack([chosen, rejected, chosen + rejected, chosen])
