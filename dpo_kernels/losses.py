"""Preference losses: one table of small functions of sequence log-probs, each per pair and unreduced.

Legend: B pairs, K responses of one prompt. A reward is r = beta * (log pi(y|x) - log ref(y|x)), the margin is
m = r_chosen - r_rejected, and log-probs are sums over the completion tokens of a response.

This table defines every loss, and the fused op differentiates these functions. Only the Triton kernel for pairs has
formulas of its own; tests hold their values and slopes to this table.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.pairs import LossOptions, Pairs


class LossType(NamedTuple):
    """A row of the table."""

    name: str
    function: Callable[[Pairs], Tensor]
    needs_reference: bool
    needs_lengths: bool
    couples_pairs: bool
    """True when the loss of a pair depends on the log-probs of others: the optimal-transport losses sort the batch."""
    per_token_reward: bool
    """True when the method defines its reward by the log-prob per token, without a reference."""
    takes_divergence: bool
    """Whether its log-ratios may be scores of another f-divergence: what does not cancel there cancels in it."""
    takes_margins: bool
    """Whether its reward margin may be asked to exceed a target."""
    likelihood: bool
    """Whether a part of it is the likelihood of the chosen response, in which tokens have no weights."""


_TABLE: dict[str, LossType] = {}

LOSS_TYPES = MappingProxyType(_TABLE)
"""Name -> :class:`LossType` of every loss, in the order of the table."""

ALIASES = MappingProxyType({"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"})
"""Names that others give losses of the table."""


def _register(
    *,
    reference: bool = True,
    lengths: bool = False,
    couples_pairs: bool = False,
    per_token_reward: bool = False,
    divergence: bool = False,
    margins: bool = False,
    likelihood: bool = False,
) -> Callable[[Callable[[Pairs], Tensor]], Callable[[Pairs], Tensor]]:
    def add(function: Callable[[Pairs], Tensor]) -> Callable[[Pairs], Tensor]:
        name = function.__name__.lstrip("_")
        flags = (reference, lengths, couples_pairs, per_token_reward, divergence, margins, likelihood)
        _TABLE[name] = LossType(name, function, *flags)
        return function

    return add


def _per_token(logps: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean over tokens; an empty response counts as one token of log-prob 0."""
    assert lengths is not None
    return logps / lengths.clamp(min=1)


def _smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m): the Bradley-Terry loss when a share e of the labels is flipped."""
    if label_smoothing == 0:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


@_register(divergence=True, margins=True)
def _sigmoid(p: Pairs) -> Tensor:
    """-log sigmoid(m). DPO, Rafailov et al. 2023, arXiv 2305.18290, Eq. 7.

    With ``label_smoothing`` e it is conservative DPO: -(1 - e) log sigmoid(m) - e log sigmoid(-m), Mitchell 2023,
    "A note on DPO with noisy preferences", Eq. 3.
    """
    return _smoothed_logistic(p.margin, p.options.label_smoothing)


@_register(divergence=True, margins=True)
def _hinge(p: Pairs) -> Tensor:
    """max(0, 1 - m). SLiC, Zhao et al. 2023, arXiv 2305.10425, with the normalised form of RSO, arXiv 2309.06657."""
    return F.relu(1 - p.margin)


@_register(lengths=True, divergence=True)
def _ipo(p: Pairs) -> Tensor:
    """(d - 1 / (2 beta))^2, d the difference of per-token log-ratios. IPO, Azar et al. 2023, arXiv 2310.12036, Eq. 17.

    Each side is averaged over its own length, as TRL does; ``ipo_sum`` does not average.
    """
    delta = _per_token(p.chosen_score, p.chosen_lengths) - _per_token(p.rejected_score, p.rejected_lengths)
    return (delta - 1 / (2 * p.options.beta)).square()


@_register(divergence=True)
def _ipo_sum(p: Pairs) -> Tensor:
    """(d - 1 / (2 beta))^2, d the difference of summed log-ratios. IPO, arXiv 2310.12036, Eq. 17 as written."""
    return (p.chosen_score - p.rejected_score - 1 / (2 * p.options.beta)).square()


@_register(divergence=True, margins=True)
def _exo_pair(p: Pairs) -> Tensor:
    """KL(softmax of rewards || smoothed labels). EXO, Ji et al. 2024, arXiv 2402.00856, Eq. 16.

    ``label_smoothing`` is the paper's epsilon; 0 would make the divergence infinite, so 1e-3 is taken instead.
    """
    epsilon = p.options.label_smoothing or 1e-3
    log_chosen, log_rejected = F.logsigmoid(p.margin), F.logsigmoid(-p.margin)
    kl_chosen = log_chosen.exp() * (log_chosen - math.log1p(-epsilon))
    return kl_chosen + log_rejected.exp() * (log_rejected - math.log(epsilon))


@_register()
def _nca_pair(p: Pairs) -> Tensor:
    """-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2. NCA, Chen et al. 2024, arXiv 2402.05369."""
    chosen, rejected = p.chosen_reward, p.rejected_reward
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@_register(divergence=True, margins=True)
def _robust(p: Pairs) -> Tensor:
    """(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e): unbiased under labels flipped at rate e.

    Robust DPO, Chowdhury et al. 2024, arXiv 2403.00409, Eq. 9; e is ``label_smoothing``.
    """
    e = p.options.label_smoothing
    return (-(1 - e) * F.logsigmoid(p.margin) + e * F.logsigmoid(-p.margin)) / (1 - 2 * e)


@_register()
def _bco_pair(p: Pairs) -> Tensor:
    """-log sigmoid(r_w) - log sigmoid(-r_l), without a reward shift. BCO, Jung et al. 2024, arXiv 2404.04656."""
    return -F.logsigmoid(p.chosen_reward) - F.logsigmoid(-p.rejected_reward)


@_register()
def _sppo_hard(p: Pairs) -> Tensor:
    """(d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2, d a log-ratio: win probabilities taken as 1 and 0.

    SPPO, Wu et al. 2024, arXiv 2405.00675, Eq. 4.7.
    """
    target = 0.5 / p.options.beta
    return (p.chosen_ratio - target).square() + (p.rejected_ratio + target).square()


@_register(couples_pairs=True)
def _aot(p: Pairs) -> Tensor:
    """Logistic loss of sorted policy gaps against sorted reference gaps. AOT, Melnyk et al. 2024, arXiv 2406.05882.

    Sorting runs over the batch, so entries of the result are quantiles and not pairs. ``label_smoothing`` as in DPO.
    """
    assert p.ref_chosen_logps is not None
    assert p.ref_rejected_logps is not None
    gaps = (p.chosen_logps - p.rejected_logps).sort().values
    ref_gaps = (p.ref_chosen_logps - p.ref_rejected_logps).sort().values
    return _smoothed_logistic(p.options.beta * (gaps - ref_gaps), p.options.label_smoothing)


@_register(couples_pairs=True)
def _aot_unpaired(p: Pairs) -> Tensor:
    """Logistic loss of sorted chosen against sorted rejected log-ratios. AOT for unpaired data, arXiv 2406.05882.

    Sorting runs over the batch, so entries of the result are quantiles and not pairs. ``label_smoothing`` as in DPO.
    """
    delta = p.chosen_ratio.sort().values - p.rejected_ratio.sort().values
    return _smoothed_logistic(p.options.beta * delta, p.options.label_smoothing)


@_register()
def _apo_zero(p: Pairs) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l). APO-zero, D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7."""
    return torch.sigmoid(-p.chosen_reward) + torch.sigmoid(p.rejected_reward)


@_register()
def _apo_down(p: Pairs) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l). APO-down, D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8."""
    return torch.sigmoid(p.chosen_reward) + torch.sigmoid(p.rejected_reward - p.chosen_reward)


@_register(divergence=True, margins=True)
def _discopop(p: Pairs) -> Tensor:
    """(1 - s) (-log sigmoid(m)) + s exp(-m), s = sigmoid(m / tau). DiscoPOP, Lu et al. 2024, arXiv 2406.08414, Eq. 5.

    The second term is one exponential of a sum of logarithms: exp(-m) alone overflows where s is 0.
    """
    m = p.margin
    scaled = m / p.options.discopop_tau
    return torch.sigmoid(-scaled) * -F.logsigmoid(m) + torch.exp(F.logsigmoid(scaled) - m)


@_register(reference=False, lengths=True, divergence=True, likelihood=True)
def _sft(p: Pairs) -> Tensor:
    """-log pi(y_w) / (mean chosen length): its mean over pairs is the mean token loss of all chosen tokens.

    The value that TRL calls ``sft``, there one number repeated for every pair; here each pair's own share of it, so
    that pairs meet only in the divisor. A batch split over several calls passes the divisor as ``mean_chosen_length``.
    """
    assert p.mean_chosen_length is not None
    return -p.likelihood / p.mean_chosen_length


@_register(reference=False, lengths=True, divergence=True, likelihood=True)
def _nll(p: Pairs) -> Tensor:
    """-log pi(y_w) / |y_w|: the mean token loss of each chosen response. The term that ``rpo_alpha`` weighs.

    RPO, Pang et al. 2024, arXiv 2404.19733, Eq. 1; ``pref_ftx`` elsewhere. Every response counts alike, however long.
    """
    return -_per_token(p.likelihood, p.chosen_lengths)


@_register(lengths=True, divergence=True, margins=True)
def _sigmoid_norm(p: Pairs) -> Tensor:
    """-log sigmoid(m), m from per-token log-ratios. Length-normalised DPO, Tulu 3, arXiv 2411.15124, Eq. 6."""
    chosen = _per_token(p.chosen_score, p.chosen_lengths)
    rejected = _per_token(p.rejected_score, p.rejected_lengths)
    return -F.logsigmoid(p.less_target(p.options.beta * (chosen - rejected)))


@_register()
def _dpop(p: Pairs) -> Tensor:
    """-log sigmoid(m - lambda max(0, -r_w)): DPO that does not let the chosen log-prob fall below the reference.

    DPO-Positive, Pal et al. 2024, arXiv 2402.13228, Eq. 3; ``dpop_lambda`` is lambda. ``label_smoothing`` as in DPO.
    """
    fallen = p.options.dpop_lambda * F.relu(-p.chosen_reward)
    return _smoothed_logistic(p.chosen_reward - p.rejected_reward - fallen, p.options.label_smoothing)


@_register()
def _dpo_shift(p: Pairs) -> Tensor:
    """-log sigmoid(r_w - f r_l), f in (0, 1] given by ``shift_lambda``: the rejected response pulls less.

    DPO-Shift, Yang et al. 2025, arXiv 2502.07599, Eq. 4, with a fixed f. ``label_smoothing`` as in DPO.
    """
    margin = p.chosen_reward - p.options.shift_lambda * p.rejected_reward
    return _smoothed_logistic(margin, p.options.label_smoothing)


@_register(reference=False, lengths=True, per_token_reward=True, margins=True)
def _simpo(p: Pairs) -> Tensor:
    """-log sigmoid(beta (a_w - a_l) - gamma), a the log-prob per token. SimPO, Meng et al., arXiv 2405.14734, Eq. 6.

    ``simpo_gamma`` is the target reward margin gamma; ``label_smoothing`` as in DPO.
    """
    chosen = _per_token(p.chosen_logps, p.chosen_lengths)
    rejected = _per_token(p.rejected_logps, p.rejected_lengths)
    margin = p.less_target(p.options.beta * (chosen - rejected) - p.options.simpo_gamma)
    return _smoothed_logistic(margin, p.options.label_smoothing)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation, Maechler 2012; x is kept below 0 by one rounding unit."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


@_register(reference=False, lengths=True, per_token_reward=True, likelihood=True)
def _orpo(p: Pairs) -> Tensor:
    """-a_w - beta log sigmoid(log odds_w - log odds_l), odds = exp(a) / (1 - exp(a)), a the log-prob per token.

    ORPO, Hong et al. 2024, arXiv 2403.07691, Eq. 6-7; ``beta`` is the paper's lambda. The language-model term is the
    mean over the tokens of each chosen response.
    """
    chosen = _per_token(p.chosen_logps, p.chosen_lengths)
    rejected = _per_token(p.rejected_logps, p.rejected_lengths)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -_per_token(p.likelihood, p.chosen_lengths) - p.options.beta * F.logsigmoid(log_odds)


@_register(reference=False, lengths=True, likelihood=True)
def _cpo(p: Pairs) -> Tensor:
    """-log sigmoid(beta (log pi_w - log pi_l)) - cpo_alpha a_w, a the log-prob per token. CPO, arXiv 2401.08417, Eq. 5.

    The behaviour-cloning term is the mean over the tokens of each chosen response. ``label_smoothing`` as in DPO.
    """
    logistic = _smoothed_logistic(p.options.beta * (p.chosen_logps - p.rejected_logps), p.options.label_smoothing)
    return logistic - p.options.cpo_alpha * _per_token(p.likelihood, p.chosen_lengths)


class LossMix(NamedTuple):
    """A weighted sum of losses, for one loss with weight 1 most of the time."""

    types: tuple[LossType, ...]
    weights: tuple[float, ...]

    @property
    def names(self) -> str:
        return " + ".join(t.name for t in self.types)

    @property
    def needs_reference(self) -> bool:
        return any(t.needs_reference for t in self.types)

    @property
    def needs_lengths(self) -> bool:
        return any(t.needs_lengths for t in self.types)

    @property
    def likelihood(self) -> bool:
        return any(t.likelihood for t in self.types)

    @property
    def couples_pairs(self) -> bool:
        return any(t.couples_pairs for t in self.types)

    @property
    def takes_margins(self) -> bool:
        """Whether there is a target margin, beside terms of pure likelihood at most."""
        return any(t.takes_margins for t in self.types) and not self.without_margins

    @property
    def without_margins(self) -> list[str]:
        """Losses that cannot be asked for a margin, and are no pure likelihood, which has none to exceed."""
        return [t.name for t in self.types if not (t.takes_margins or t.name in ("sft", "nll"))]

    def losses(self, pairs: Pairs) -> Tensor:
        """Loss of every pair, [B]."""
        total = None
        for loss_type, weight in zip(self.types, self.weights, strict=True):
            loss = loss_type.function(pairs)
            loss = loss if weight == 1 else weight * loss
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Detached rewards of chosen and rejected, [B] each."""
        if all(t.per_token_reward for t in self.types):
            chosen = _per_token(pairs.chosen_logps, pairs.chosen_lengths)
            rejected = _per_token(pairs.rejected_logps, pairs.rejected_lengths)
        elif pairs.ref_chosen_logps is not None and pairs.ref_rejected_logps is not None:
            chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
        else:
            chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        return pairs.options.beta * chosen.detach(), pairs.options.beta * rejected.detach()


def resolve_loss(loss_type: str | Sequence[str], loss_weights: Sequence[float] | None = None) -> LossMix:
    """Look names up in the table; "dpo" is "sigmoid", "dpo_norm" is "sigmoid_norm".

    Args:
        loss_type: a name, or several, whose losses are added.
        loss_weights: one factor per name; all 1 by default.

    Raises:
        ValueError: an unknown name (the nearest one is suggested), no name, or weights that do not match the names or
            are not finite.
    """
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    names = tuple(ALIASES.get(name, name) for name in names)
    if not names:
        raise ValueError("loss_type must name at least one loss; got an empty list")
    for name in names:
        if name not in _TABLE:
            nearest = difflib.get_close_matches(str(name), _TABLE, n=1)
            hint = f"did you mean {nearest[0]!r}? Expected" if nearest else "expected"
            known = ", ".join((*_TABLE, *ALIASES))
            raise ValueError(f"unknown loss_type {name!r}; {hint} one of {known}")
    weights = (1.0,) * len(names) if loss_weights is None else tuple(float(w) for w in loss_weights)
    if len(weights) != len(names):
        raise ValueError(f"loss_weights must have one entry per loss_type, expected {len(names)}; got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"loss_weights must be finite; got {', '.join(map(str, weights))}")
    return LossMix(tuple(_TABLE[name] for name in names), weights)


def check_mix(mix: LossMix, options: LossOptions, margins: Tensor | None) -> None:
    """Raise ValueError for options that have no meaning for a loss."""
    without = [t.name for t in mix.types if not t.takes_divergence]
    if options.divergence != "reverse_kl" and without:
        allowed = ", ".join(t.name for t in _TABLE.values() if t.takes_divergence)
        raise ValueError(
            f"f_divergence_type other than reverse_kl has no meaning for {', '.join(without)}: what does not cancel "
            f"there cancels in {allowed} alone"
        )
    if margins is not None and (without := mix.without_margins):
        allowed = ", ".join(t.name for t in _TABLE.values() if t.takes_margins)
        raise ValueError(f"margins have no meaning for {', '.join(without)}; losses with a target margin: {allowed}")


def resolve_mean_length(mean_chosen_length: float | None, chosen_lengths: Tensor | None) -> Tensor | float | None:
    """Tokens per chosen response: the number given, else the mean of ``chosen_lengths``, at least one token in all."""
    if mean_chosen_length is not None:
        if not mean_chosen_length > 0:
            raise ValueError(f"mean_chosen_length must be positive, or None; got {mean_chosen_length}")
        return mean_chosen_length
    if chosen_lengths is None:
        return None
    return chosen_lengths.sum().clamp(min=1) / chosen_lengths.numel()
