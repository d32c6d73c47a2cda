"""What the configured loss adds up and takes, before there is any model."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from ..config.losses import COUPLED_LOSSES
from ..config.schema import LossConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..errors import UserError

if TYPE_CHECKING:
    from dpo_kernels.losses import LossMix

RANKING_LOSS = "plackett_luce"
LOW_SIMPO_BETA = 0.5
EVEN = 1.33
"""How many times as much as undesirable rows desirable ones may weigh; as TRL rounds four thirds."""


class LossTerms:
    """The losses of a configuration and what they need."""

    def __init__(self, config: LossConfig):
        self.config = config
        self.ranks = RANKING_LOSS in config.loss_types
        self.unpaired = config.unpaired
        self.ld_alpha = None if config.ld_alpha == 1 else config.ld_alpha

    @cached_property
    def mix(self) -> LossMix | None:
        """The losses as the table has them; None for a ranking and for unpaired rows."""
        if self.ranks or self.unpaired:
            return None
        # The table brings torch, and most questions are answered without it.
        from dpo_kernels.losses import resolve_loss

        terms = self.config.terms
        return resolve_loss(tuple(terms), tuple(terms.values()))

    @property
    def needs_reference(self) -> bool:
        return self.mix is None or self.mix.needs_reference

    @property
    def caution(self) -> str | None:
        """What of the configuration is hardly meant; None for nothing."""
        if "simpo" not in self.config.loss_types or self.config.beta > LOW_SIMPO_BETA:
            return None
        return (
            f"loss.beta {self.config.beta:g} is small for simpo, which compares log-probs per token: its authors take "
            "2 to 10, and the default of 0.1 is that of losses of whole responses"
        )

    def uneven(self, desirable: int, undesirable: int) -> str | None:
        """What to say of labels that do not weigh evenly, by equation 8 of arXiv 2402.01306; None where they do.

        Args:
            desirable, undesirable: rows of each label.
        """
        c = self.config
        good, bad = desirable * c.desirable_weight, undesirable * c.undesirable_weight
        if not self.unpaired or desirable == undesirable or not (good and bad) or 1 <= good / bad <= EVEN:
            return None
        first, second = bad / desirable, good / undesirable
        return (
            f"{desirable:,} desirable rows weigh {good / bad:.3g} times as much as {undesirable:,} undesirable ones, "
            f"and 1 to {EVEN} times is advised: set loss.desirable_weight to {first:.3g} to {EVEN * first:.3g}, or "
            f"loss.undesirable_weight to {second / EVEN:.3g} to {second:.3g}"
        )

    @property
    def couples_pairs(self) -> bool:
        return not COUPLED_LOSSES.isdisjoint(self.config.loss_types)

    @property
    def needs_token_logps(self) -> bool:
        """Whether the log-probs come first and the loss of them then: ``linear_logps`` instead of the fused op."""
        weighs_likelihood = self.ld_alpha is not None and self.mix is not None and self.mix.likelihood
        return self.couples_pairs or self.config.use_weighting or weighs_likelihood

    @property
    def against_several_pairs(self) -> str | None:
        """Why a group cannot stand for several pairs; None when it can."""
        whole = self.ranks or self.unpaired or self.couples_pairs
        if not (whole or self.ld_alpha is not None):
            return None
        needed = "ranking" if self.ranks else "best_worst"
        what = f"loss_type {self.config.loss_name}" if whole else "ld_alpha"
        return f"loss.{what} does not take several pairs of one prompt: set data.scored_pairs to {needed}"

    def against_numbers(self, *, weights: bool, margins: bool, tokens: bool = False) -> str | None:
        """Why rows cannot have weights, or margins, with this loss; None when they can.

        Args:
            tokens: whether single tokens count differently.
        """
        if tokens and self.unpaired:
            return (
                f"rows have a mask or weights of tokens, or data.mask_pattern leaves some out, and loss.loss_type "
                f"{self.config.loss_name} counts every token alike: leave them out with data.columns: {{mask: null, "
                "weights: null}, and data.mask_pattern"
            )
        if weights and self.couples_pairs:
            part, why = "weight", "its losses are quantiles of a step and not pairs"
        elif margins and (self.mix is None or not self.mix.takes_margins):
            part, why = "margin", "it has no margin that could be asked to exceed one"
        else:
            return None
        return (
            f"rows have a column {part}, which has no meaning for loss.loss_type {self.config.loss_name}: {why}; leave "
            f"it out with data.columns: {{{part}: null}}"
        )

    def check_dataset(self, dataset: PreferenceDataset) -> None:
        """Raise a ``UserError`` when groups are not what the loss takes: pairs, or rankings."""
        if (dataset.terms > 1).any() and (reason := self.against_several_pairs):
            raise UserError(reason)
        weighted, apart = (dataset.weights_G != 1).any(), (dataset.margins_G != 0).any()
        if reason := self.against_numbers(weights=bool(weighted), margins=bool(apart), tokens=dataset.weighs_tokens):
            raise UserError(reason)
        for index in (dataset.labelled_G != self.unpaired).nonzero()[0][:1]:
            raise UserError(self._against_row(dataset[index]))
        if self.couples_pairs and self.mix is not None and self.mix.likelihood and dataset.has_fractions:
            raise UserError(
                f"rows have weights of tokens, which loss.loss_type {self.config.loss_name} does not take together: "
                "leave out either, or let weights be 0 and 1"
            )
        if self.ranks or self.unpaired:
            return
        responses = dataset.lengths.responses
        for index in ((responses != 2) & ~dataset.has_pairs).nonzero()[0][:1]:
            raise UserError(
                f"row {dataset[index].label} has {responses[index]} responses, and loss.loss_type "
                f"{self.config.loss_name} takes pairs: set loss.loss_type to {RANKING_LOSS}"
            )

    def _against_row(self, group: PreferenceGroup) -> str:
        """Why a row cannot be taken, since it is unpaired or since it is not."""
        if self.unpaired:
            return (
                f"row {group.label} has {len(group.response_ids)} responses, and loss.loss_type "
                f"{self.config.loss_name} takes labelled completions or pairs: set data.scored_pairs to best_worst for "
                f"scored ones, or loss.loss_type to {RANKING_LOSS}"
            )
        return (
            f"row {group.label} is one completion with a label, and loss.loss_type {self.config.loss_name} compares "
            "completions of one prompt: set loss.loss_type to kto"
        )
