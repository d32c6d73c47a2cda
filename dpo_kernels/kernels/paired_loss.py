"""Paired losses in one launch: response sums, loss, and the slope of each response spread over its rows.

Legend: T rows, P pairs, S = 2 P responses in order chosen_0, rejected_0, chosen_1, ...
One program a pair. Formulas and their sources are in `dpo_kernels.losses`, the definition that tests compare these
with; what is added here is the derivative by each log-prob sum. Losses that couple pairs are not here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.launch import COMPILATION, on_device
from dpo_kernels.kernels.logits_tile import one_minus_exp, softplus
from dpo_kernels.pairs import LossOptions

MARGIN_LOSSES = ("sigmoid", "hinge", "ipo_sum", "exo_pair", "robust", "discopop")
REWARD_LOSSES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "dpop", "dpo_shift")
PER_TOKEN_LOSSES = ("ipo", "sigmoid_norm", "simpo", "orpo", "cpo", "sft", "nll")
KERNEL_LOSSES = (*MARGIN_LOSSES, *REWARD_LOSSES, *PER_TOKEN_LOSSES)


@triton.jit
def _score(ratio, f_alpha, DIVERGENCE: tl.constexpr):
    """What takes the place of a log-ratio under a divergence, and its derivative by the ratio."""
    if DIVERGENCE == "forward_kl":
        # Not tl.minimum, which drops a nan. Beyond 80 the tangent, as in the table.
        beyond = tl.where(ratio < -80.0, -ratio - 80.0, 0.0)
        slope = tl.exp(tl.where(ratio < -80.0, 80.0, -ratio))
        score = 1.0 - slope * (1.0 + beyond)
    elif DIVERGENCE == "js_divergence":
        score = 0.6931471805599453 - softplus(-ratio)
        slope = tl.sigmoid(-ratio)
    elif DIVERGENCE == "alpha_divergence":
        power = f_alpha - 1.0
        exponent = power * ratio
        # Not tl.minimum, which drops a nan. 80 is where the table cuts off.
        slope = tl.exp(tl.where(exponent > 80.0, 80.0, exponent))
        score = (slope - 1.0) / power
        slope = tl.where(exponent > 80.0, 0.0, slope)
    else:
        tl.static_assert(DIVERGENCE == "reverse_kl")
        score = ratio
        slope = 1.0
    return score, slope


@triton.jit
def _logistic(margin, smoothing):
    """Smoothed -log sigmoid(margin), and its derivative."""
    # An infinite margin times a smoothing of 0 would be nan.
    loss = (1.0 - smoothing) * softplus(-margin) + tl.where(smoothing > 0.0, smoothing * softplus(margin), 0.0)
    return loss, smoothing * tl.sigmoid(margin) - (1.0 - smoothing) * tl.sigmoid(-margin)


@triton.jit
def _margin_loss(margin, beta, smoothing, tau, log_kept, log_flipped, LOSS: tl.constexpr):
    """Loss of the reward margin, and its derivative."""
    if LOSS == "sigmoid":
        loss, slope = _logistic(margin, smoothing)
    elif LOSS == "hinge":
        # Not tl.maximum, which drops a nan.
        loss = tl.where(margin >= 1.0, 0.0, 1.0 - margin)
        slope = tl.where(margin >= 1.0, 0.0, -1.0)
    elif LOSS == "ipo_sum":
        gap = (margin - 0.5) / beta
        loss = gap * gap
        slope = 2.0 * gap / beta
    elif LOSS == "exo_pair":
        chosen, rejected = -softplus(-margin), -softplus(margin)
        loss = tl.exp(chosen) * (chosen - log_kept) + tl.exp(rejected) * (rejected - log_flipped)
        slope = tl.exp(chosen + rejected) * (margin - log_kept + log_flipped)
    elif LOSS == "robust":
        rest = 1.0 - 2.0 * smoothing
        loss = ((1.0 - smoothing) * softplus(-margin) - smoothing * softplus(margin)) / rest
        slope = -((1.0 - smoothing) * tl.sigmoid(-margin) + smoothing * tl.sigmoid(margin)) / rest
    else:
        tl.static_assert(LOSS == "discopop")
        scaled = margin / tau
        logistic, logistic_share = softplus(-margin), tl.sigmoid(-scaled)
        exponential = tl.exp(-softplus(-scaled) - margin)
        loss = logistic_share * logistic + exponential
        slope = -logistic_share * (tl.sigmoid(scaled) / tau * logistic + tl.sigmoid(-margin))
        slope += exponential * (logistic_share / tau - 1.0)
    return loss, slope


@triton.jit
def _reward_loss(chosen, rejected, beta, smoothing, alpha, LOSS: tl.constexpr):
    """Loss of both rewards, and its derivatives with respect to them."""
    if LOSS == "nca_pair":
        loss = softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected)
        chosen_slope = 0.5 * tl.sigmoid(chosen) - tl.sigmoid(-chosen)
        rejected_slope = 0.5 * tl.sigmoid(rejected)
    elif LOSS == "bco_pair":
        loss = softplus(-chosen) + softplus(rejected)
        chosen_slope = -tl.sigmoid(-chosen)
        rejected_slope = tl.sigmoid(rejected)
    elif LOSS == "sppo_hard":
        chosen_gap, rejected_gap = (chosen - 0.5) / beta, (rejected + 0.5) / beta
        loss = chosen_gap * chosen_gap + rejected_gap * rejected_gap
        chosen_slope = 2.0 * chosen_gap / beta
        rejected_slope = 2.0 * rejected_gap / beta
    elif LOSS == "apo_zero":
        loss = tl.sigmoid(-chosen) + tl.sigmoid(rejected)
        chosen_slope = -tl.sigmoid(chosen) * tl.sigmoid(-chosen)
        rejected_slope = tl.sigmoid(rejected) * tl.sigmoid(-rejected)
    elif LOSS == "dpop":
        fallen = chosen < 0.0
        loss, slope = _logistic(chosen - rejected - tl.where(fallen, -alpha * chosen, 0.0), smoothing)
        chosen_slope = slope * tl.where(fallen, 1.0 + alpha, 1.0)
        rejected_slope = -slope
    elif LOSS == "dpo_shift":
        loss, chosen_slope = _logistic(chosen - alpha * rejected, smoothing)
        rejected_slope = -alpha * chosen_slope
    else:
        tl.static_assert(LOSS == "apo_down")
        margin = chosen - rejected
        loss = tl.sigmoid(chosen) + tl.sigmoid(-margin)
        rejected_slope = tl.sigmoid(margin) * tl.sigmoid(-margin)
        chosen_slope = tl.sigmoid(chosen) * tl.sigmoid(-chosen) - rejected_slope
    return loss, chosen_slope, rejected_slope


@triton.jit
def _log_odds(logp):
    """log(e^x / (1 - e^x)) for x < 0, and its derivative. x is kept one rounding unit below 0, and flat beyond."""
    x = tl.minimum(logp, -1.1920929e-7)
    miss = one_minus_exp(x)
    u = tl.exp(x)
    # log(1 - u): exact where 1 - u would round u away.
    log_miss = tl.where(miss == 1.0, -u, tl.log(miss))
    return logp - log_miss, 1.0 + tl.where(logp > x, 0.0, u / miss)


@triton.jit
def _per_token_loss(
    chosen, rejected, chosen_score, rejected_score, chosen_length, rejected_length, mean_length,
    target, beta, smoothing, gamma, alpha, LOSS: tl.constexpr,
):  # fmt: skip
    """Loss of log-probs per token, and its derivatives with respect to the sums, or to scores where it reads those."""
    if LOSS == "ipo":
        gap = chosen_score / chosen_length - rejected_score / rejected_length - 0.5 / beta
        loss = gap * gap
        chosen_slope = 2.0 * gap / chosen_length
        rejected_slope = -2.0 * gap / rejected_length
    elif LOSS == "sigmoid_norm":
        margin = beta * (chosen_score / chosen_length - rejected_score / rejected_length) - target
        loss, slope = _logistic(margin, 0.0)
        chosen_slope = beta * slope / chosen_length
        rejected_slope = -beta * slope / rejected_length
    elif LOSS == "simpo":
        margin = beta * (chosen / chosen_length - rejected / rejected_length) - gamma - target
        loss, slope = _logistic(margin, smoothing)
        chosen_slope = beta * slope / chosen_length
        rejected_slope = -beta * slope / rejected_length
    elif LOSS == "orpo":
        chosen_odds, chosen_factor = _log_odds(chosen / chosen_length)
        rejected_odds, rejected_factor = _log_odds(rejected / rejected_length)
        logistic, slope = _logistic(chosen_odds - rejected_odds, 0.0)
        loss = beta * logistic - chosen / chosen_length
        chosen_slope = (beta * slope * chosen_factor - 1.0) / chosen_length
        rejected_slope = -beta * slope * rejected_factor / rejected_length
    elif LOSS == "cpo":
        logistic, slope = _logistic(beta * (chosen - rejected), smoothing)
        loss = logistic - alpha * chosen / chosen_length
        chosen_slope = beta * slope - alpha / chosen_length
        rejected_slope = -beta * slope
    elif LOSS == "nll":
        loss = -chosen / chosen_length
        chosen_slope = -1.0 / chosen_length
        rejected_slope = 0.0
    else:
        tl.static_assert(LOSS == "sft")
        loss = -chosen / mean_length
        chosen_slope = -1.0 / mean_length
        rejected_slope = 0.0
    return loss, chosen_slope, rejected_slope


@triton.jit
def _response_sum(logps_ptr, start, stop, BLOCK: tl.constexpr):
    """Sum of a response's log-probs in fp64, rounded once."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        total += tl.load(logps_ptr + rows, mask=rows < stop, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0).to(tl.float32)


@triton.jit
def _spread(grad_ptr, value, start, stop, BLOCK: tl.constexpr, ADD: tl.constexpr):
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        values = tl.zeros((BLOCK,), dtype=tl.float32) + value
        if ADD:
            values += tl.load(grad_ptr + rows, mask=rows < stop, other=0.0)
        tl.store(grad_ptr + rows, values, mask=rows < stop)


@triton.jit(
    do_not_specialize=[
        "logps_ptr",
        "cu_ptr",
        "ref_ptr",
        "lengths_ptr",
        "mean_length_ptr",
        "scale_ptr",
        "margins_ptr",
        "losses_ptr",
        "sums_ptr",
        "slopes_ptr",
        "grad_ptr",
        "first_row",
    ]
)
def paired_loss_kernel(
    logps_ptr,
    cu_ptr,
    ref_ptr,
    lengths_ptr,
    mean_length_ptr,
    scale_ptr,
    margins_ptr,
    losses_ptr,
    sums_ptr,
    slopes_ptr,
    grad_ptr,
    first_row,
    weight,
    beta,
    smoothing,
    tau,
    gamma,
    alpha,
    f_alpha,
    log_kept,
    log_flipped,
    LOSS: tl.constexpr,
    FORM: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pointers to responses and pairs begin at the first pair of the launch, those to rows at its first_row. alpha is
    the number that cpo, dpop or dpo_shift has of its own."""
    pair = tl.program_id(0)
    # Before torch 2.15 a compiled graph hands Python floats over as fp64.
    beta, smoothing, tau = tl.cast(beta, tl.float32), tl.cast(smoothing, tl.float32), tl.cast(tau, tl.float32)
    gamma, alpha, weight = tl.cast(gamma, tl.float32), tl.cast(alpha, tl.float32), tl.cast(weight, tl.float32)
    start = tl.load(cu_ptr + 2 * pair) - first_row
    middle = tl.load(cu_ptr + 2 * pair + 1) - first_row
    stop = tl.load(cu_ptr + 2 * pair + 2) - first_row
    chosen = _response_sum(logps_ptr, start, middle, BLOCK)
    rejected = _response_sum(logps_ptr, middle, stop, BLOCK)

    chosen_ratio, rejected_ratio = chosen, rejected
    if ref_ptr is not None:
        chosen_ratio -= tl.load(ref_ptr + 2 * pair)
        rejected_ratio -= tl.load(ref_ptr + 2 * pair + 1)
    chosen_length, rejected_length, mean_length = 1.0, 1.0, 1.0
    if lengths_ptr is not None:
        chosen_length = tl.maximum(tl.load(lengths_ptr + 2 * pair), 1.0)
        rejected_length = tl.maximum(tl.load(lengths_ptr + 2 * pair + 1), 1.0)
    if mean_length_ptr is not None:
        mean_length = tl.load(mean_length_ptr)
    target = 0.0
    if margins_ptr is not None:
        target = tl.load(margins_ptr + pair)
    chosen_score, chosen_rate = _score(chosen_ratio, tl.cast(f_alpha, tl.float32), DIVERGENCE)
    rejected_score, rejected_rate = _score(rejected_ratio, tl.cast(f_alpha, tl.float32), DIVERGENCE)

    if FORM == "margin":
        loss, margin_slope = _margin_loss(
            beta * chosen_score - beta * rejected_score - target, beta, smoothing, tau,
            tl.cast(log_kept, tl.float32), tl.cast(log_flipped, tl.float32), LOSS,
        )  # fmt: skip
        chosen_slope, rejected_slope = beta * margin_slope, -beta * margin_slope
    elif FORM == "rewards":
        loss, chosen_slope, rejected_slope = _reward_loss(
            beta * chosen_ratio, beta * rejected_ratio, beta, smoothing, alpha, LOSS
        )
        chosen_slope, rejected_slope = beta * chosen_slope, beta * rejected_slope
    else:
        loss, chosen_slope, rejected_slope = _per_token_loss(
            chosen, rejected, chosen_score, rejected_score, chosen_length, rejected_length, mean_length,
            target, beta, smoothing, gamma, alpha, LOSS,
        )  # fmt: skip
    if FORM == "margin" or LOSS == "ipo" or LOSS == "sigmoid_norm":
        chosen_slope, rejected_slope = chosen_slope * chosen_rate, rejected_slope * rejected_rate

    scale = weight * tl.load(scale_ptr + pair)
    loss *= weight
    chosen_slope *= scale
    rejected_slope *= scale
    _spread(grad_ptr, chosen_slope, start, middle, BLOCK, ADD)
    _spread(grad_ptr, rejected_slope, middle, stop, BLOCK, ADD)
    if ADD:
        loss += tl.load(losses_ptr + pair)
        chosen_slope += tl.load(slopes_ptr + 2 * pair)
        rejected_slope += tl.load(slopes_ptr + 2 * pair + 1)
    tl.store(losses_ptr + pair, loss)
    tl.store(slopes_ptr + 2 * pair, chosen_slope)
    tl.store(slopes_ptr + 2 * pair + 1, rejected_slope)
    tl.store(sums_ptr + 2 * pair, chosen)
    tl.store(sums_ptr + 2 * pair + 1, rejected)


class PairTerms(NamedTuple):
    """What every loss of a call is made from; fp32 tensors on one device, all responses and pairs of the call."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    discopop_tau: float
    simpo_gamma: float
    cpo_alpha: float
    dpop_lambda: float
    shift_lambda: float
    divergence: str
    f_alpha: float
    ref_logps_S: torch.Tensor | None
    lengths_S: torch.Tensor | None
    mean_length: torch.Tensor | None
    """One number: tokens per chosen response."""
    scale_P: torch.Tensor
    """d (reduced loss) / d (loss of a pair)."""
    cu_S1: torch.Tensor
    """int32 offsets of the responses in the rows."""
    margins_P: torch.Tensor | None = None

    def own_number(self, name: str) -> float:
        """The number that a loss has for itself."""
        return {"dpop": self.dpop_lambda, "dpo_shift": self.shift_lambda}.get(name, self.cpo_alpha)


def loss_numbers(options: LossOptions) -> dict[str, Any]:
    """The fields of `PairTerms` that are options of a loss."""
    numbers = options._asdict()
    del numbers["f_divergence"]
    return {**numbers, "divergence": options.divergence}


class PairScores(NamedTuple):
    losses_P: torch.Tensor
    logps_S: torch.Tensor
    slopes_S: torch.Tensor
    """d (reduced loss) / d logps."""
    grad_T: torch.Tensor
    """The slope of its response for every row."""


def launch_pairs(
    logps_T: torch.Tensor, terms: PairTerms, *, first_pair: int, num_pairs: int, first_row: int
) -> PairScores:
    """Score consecutive pairs whose rows, from `first_row` of the call on, have log-probs logps_T (fp32)."""
    unknown = set(terms.names) - set(KERNEL_LOSSES)
    assert not unknown, f"no kernel for {unknown}"
    device = logps_T.device
    losses_P = torch.empty(num_pairs, dtype=torch.float32, device=device)
    sums_S, slopes_S = torch.empty(2, 2 * num_pairs, dtype=torch.float32, device=device)
    grad_T = torch.empty_like(logps_T)
    responses = slice(2 * first_pair, 2 * (first_pair + num_pairs))
    # The exclusive-optimum loss is infinite without smoothing; its table entry takes 1e-3 instead.
    epsilon = terms.label_smoothing or 1e-3
    with on_device(device):
        for position, (name, weight) in enumerate(zip(terms.names, terms.weights, strict=True)):
            paired_loss_kernel[(num_pairs,)](
                logps_T,
                terms.cu_S1[responses.start :],
                None if terms.ref_logps_S is None else terms.ref_logps_S[responses],
                None if terms.lengths_S is None else terms.lengths_S[responses],
                terms.mean_length,
                terms.scale_P[first_pair:],
                None if terms.margins_P is None else terms.margins_P[first_pair:],
                losses_P,
                sums_S,
                slopes_S,
                grad_T,
                first_row,
                weight,
                terms.beta,
                terms.label_smoothing,
                terms.discopop_tau,
                terms.simpo_gamma,
                terms.own_number(name),
                terms.f_alpha,
                math.log1p(-epsilon),
                math.log(epsilon),
                LOSS=name,
                FORM=_form(name),
                DIVERGENCE=terms.divergence,
                ADD=position > 0,
                BLOCK=1024,
                num_warps=4,
                **COMPILATION,
            )
    return PairScores(losses_P, sums_S, slopes_S, grad_T)


def _form(name: str) -> str:
    if name in MARGIN_LOSSES:
        return "margin"
    return "rewards" if name in REWARD_LOSSES else "per_token"
