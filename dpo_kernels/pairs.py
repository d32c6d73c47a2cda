"""What preference losses are made of: a record of pairs, the numbers that losses read, and f-divergence scores.

Legend: B pairs. A ratio is log pi(y|x) - log ref(y|x), a reward beta times it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""Divergences between policy and reference, by TRL's names; the first is that of DPO."""
LARGEST_EXPONENT = 80.0
"""Where the exponential of the alpha-divergence is cut off, as in TRL: float32 ends at 88. From there on that of the
forward KL divergence goes on as its tangent, so that of two responses far below the reference the lower one is known.
"""


class LossOptions(NamedTuple):
    """Every number that some loss reads. Defaults are those of TRL where TRL has the option."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    dpop_lambda: float = 50.0
    shift_lambda: float = 0.95
    f_divergence: float = 0
    """Place in ``F_DIVERGENCES``: an operator takes numbers alone."""
    f_alpha: float = 0.5

    @property
    def divergence(self) -> str:
        """What the scores are made of; alpha_divergence at 1 is its own limit, the reverse KL divergence."""
        name = F_DIVERGENCES[int(self.f_divergence)]
        return "reverse_kl" if name == "alpha_divergence" and abs(self.f_alpha - 1) < 1e-6 else name


def f_divergence_number(name: str) -> int:
    """Place of a divergence in ``F_DIVERGENCES``; ValueError for another name."""
    if name not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}; got {name!r}")
    return F_DIVERGENCES.index(name)


def make_options(*, f_divergence_type: str, f_alpha_divergence_coef: float, **numbers: float) -> LossOptions:
    """Keywords of the public functions as a record, checked."""
    place = f_divergence_number(f_divergence_type)
    options = LossOptions(f_divergence=place, f_alpha=f_alpha_divergence_coef, **numbers)
    check_options(options)
    return options


def check_options(options: LossOptions) -> None:
    """Raise ValueError for a number outside its range, or not finite."""
    if not options.beta > 0:
        raise ValueError(f"beta must be positive; got {options.beta}")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {options.label_smoothing}")
    if not options.discopop_tau > 0:
        raise ValueError(f"discopop_tau must be positive; got {options.discopop_tau}")
    if not options.dpop_lambda >= 0:
        raise ValueError(f"dpop_lambda must not be negative; got {options.dpop_lambda}")
    if not 0 < options.shift_lambda <= 1:
        raise ValueError(f"shift_lambda must be in (0, 1]; got {options.shift_lambda}")
    for name, value in options._asdict().items():
        if not -math.inf < value < math.inf:
            raise ValueError(f"{'f_alpha_divergence_coef' if name == 'f_alpha' else name} must be finite; got {value}")


def score(ratio: Tensor, options: LossOptions) -> Tensor:
    """f'(e^ratio), what takes the place of a log-ratio under another divergence. f-DPO, Wang et al. 2023,
    arXiv 2309.16240, Table 1, in the form of TRL 1.16."""
    kind = options.divergence
    if kind == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=LARGEST_EXPONENT)) * (1 + F.relu(-ratio - LARGEST_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if kind == "alpha_divergence":
        power = options.f_alpha - 1
        return (torch.exp((power * ratio).clamp(max=LARGEST_EXPONENT)) - 1) / power
    return ratio


class Pairs(NamedTuple):
    """What a loss sees: tensors [B]; references and lengths are there when the loss declares that it needs them."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None
    ref_rejected_logps: Tensor | None
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    mean_chosen_length: Tensor | float | None
    """Over the whole batch, of which these pairs may be a part."""
    options: LossOptions
    margins: Tensor | None = None
    """By how much the reward margin of each pair is to be exceeded; None for 0."""
    unweighted_chosen_logps: Tensor | None = None
    """Without weights of tokens, for terms that are a likelihood; None where there are no such weights."""

    @property
    def chosen_ratio(self) -> Tensor:
        assert self.ref_chosen_logps is not None
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_ratio(self) -> Tensor:
        assert self.ref_rejected_logps is not None
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def chosen_reward(self) -> Tensor:
        return self.options.beta * self.chosen_ratio

    @property
    def rejected_reward(self) -> Tensor:
        return self.options.beta * self.rejected_ratio

    @property
    def chosen_score(self) -> Tensor:
        return score(self.chosen_ratio, self.options)

    @property
    def rejected_score(self) -> Tensor:
        return score(self.rejected_ratio, self.options)

    @property
    def margin(self) -> Tensor:
        """Of the scores, less the target margin."""
        return self.less_target(self.options.beta * self.chosen_score - self.options.beta * self.rejected_score)

    @property
    def likelihood(self) -> Tensor:
        """Log-probs of the chosen responses that terms of likelihood read."""
        return self.chosen_logps if self.unweighted_chosen_logps is None else self.unweighted_chosen_logps

    def less_target(self, margin: Tensor) -> Tensor:
        return margin if self.margins is None else margin - self.margins
