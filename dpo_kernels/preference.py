"""Preference losses of log-probs that are already there: pairs, and full rankings.

Legend: B pairs or prompts, K responses of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.losses import check_mix, resolve_loss, resolve_mean_length
from dpo_kernels.pairs import LossOptions, Pairs, check_options, make_options


class PreferenceLoss(NamedTuple):
    """Per pair (or, for Plackett-Luce, per prompt), unreduced. Only ``loss`` carries gradients."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class PlackettLuceLoss(NamedTuple):
    """Per prompt, unreduced. Only ``loss`` carries gradients."""

    loss: Tensor
    rewards: Tensor


def _as_float(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, like chosen_logps; got {list(tensor.shape)}")
    return tensor.to(torch.promote_types(like.dtype, torch.float32))


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    dpop_lambda: float = 50.0,
    shift_lambda: float = 0.95,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    mean_chosen_length: float | None = None,
    margins: Tensor | None = None,
    unweighted_chosen_logps: Tensor | None = None,
) -> PreferenceLoss:
    """Loss and rewards of preference pairs from the log-probs of their responses.

    Args:
        chosen_logps, rejected_logps: [B], log-probs summed over completion tokens, in nats, any float dtype. 16-bit
            values are raised to float32 first; float64 stays.
        ref_chosen_logps, ref_rejected_logps: [B], the same under the reference. May be None for ``sft``, ``nll``,
            ``simpo``, ``orpo`` and ``cpo``.
        loss_type: a name in ``LOSS_TYPES`` ("dpo" is "sigmoid"), or several, whose losses are added with
            ``loss_weights`` (MPO, arXiv 2411.10442).
        loss_weights: one factor per name; all 1 by default.
        beta: strength of the pull to the reference; the weight of the odds-ratio term in ``orpo``.
        label_smoothing: share of flipped labels, in [0, 0.5). Read by ``sigmoid`` (conservative DPO), ``robust``,
            ``exo_pair``, ``aot``, ``aot_unpaired``, ``dpop``, ``dpo_shift``, ``simpo`` and ``cpo``; the others ignore
            it, as in TRL.
        chosen_lengths, rejected_lengths: [B], completion tokens. Needed by ``ipo``, ``sigmoid_norm``, ``sft``,
            ``nll``, ``simpo``, ``orpo`` and ``cpo``. An empty response counts as one token.
        discopop_tau: temperature of ``discopop``.
        simpo_gamma: target reward margin of ``simpo``.
        cpo_alpha: weight of the language-model term of ``cpo``.
        mean_chosen_length: tokens per chosen response over the whole batch, for ``sft`` when the batch is split over
            several calls; by default the mean of ``chosen_lengths``.
        dpop_lambda: weight of the fall of the chosen log-prob below the reference, in ``dpop``.
        shift_lambda: what ``dpo_shift`` multiplies the rejected reward by, in (0, 1].
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" between policy and
            reference, for losses of the reward difference (``sigmoid``, ``hinge``, ``ipo``, ``ipo_sum``, ``exo_pair``,
            ``robust``, ``discopop``, ``sigmoid_norm``) and beside them ``sft`` and ``nll``. Rewards stay log-ratios.
        f_alpha_divergence_coef: alpha of "alpha_divergence"; at 1 it is "reverse_kl".
        margins: [B] or None, by how much the reward margin is to be exceeded, for ``sigmoid``, ``hinge``,
            ``exo_pair``, ``robust``, ``discopop``, ``sigmoid_norm`` and ``simpo`` (ODPO, arXiv 2402.10571, Eq. 5).
        unweighted_chosen_logps: [B] or None, what the likelihood terms of ``sft``, ``nll``, ``orpo`` and ``cpo`` read
            where ``chosen_logps`` are weighted sums.

    Returns:
        ``PreferenceLoss(loss, chosen_rewards, rejected_rewards)``, each [B], float32 (float64 for float64 inputs).
        Rewards are detached: beta times the log-ratio, or the log-prob when no reference is given, or the log-prob per
        token for ``simpo`` and ``orpo``. ``aot`` losses are quantiles of the batch, not in the order of the pairs.

    Raises:
        ValueError: unknown loss, shapes that differ, missing reference or lengths, numbers out of range.
    """
    mix = resolve_loss(loss_type, loss_weights)
    options = make_options(
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        cpo_alpha=cpo_alpha,
        dpop_lambda=dpop_lambda,
        shift_lambda=shift_lambda,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
    )
    check_mix(mix, options, margins)
    if chosen_logps.ndim != 1:
        raise ValueError(f"chosen_logps must have shape [pairs]; got {list(chosen_logps.shape)}")
    if mix.needs_reference and (ref_chosen_logps is None or ref_rejected_logps is None):
        raise ValueError(f"loss_type {mix.names} needs ref_chosen_logps and ref_rejected_logps; got None")
    if mix.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"loss_type {mix.names} needs chosen_lengths and rejected_lengths; got None")

    def as_float(name: str, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _as_float(name, tensor, chosen_logps)

    lengths = as_float("chosen_lengths", chosen_lengths)
    pairs = Pairs(
        _as_float("chosen_logps", chosen_logps, chosen_logps),
        _as_float("rejected_logps", rejected_logps, chosen_logps),
        as_float("ref_chosen_logps", ref_chosen_logps),
        as_float("ref_rejected_logps", ref_rejected_logps),
        lengths,
        as_float("rejected_lengths", rejected_lengths),
        resolve_mean_length(mean_chosen_length, lengths),
        options,
        as_float("margins", margins),
        as_float("unweighted_chosen_logps", unweighted_chosen_logps),
    )
    return PreferenceLoss(mix.losses(pairs), *mix.rewards(pairs))


def ld_token_weights(cu_responses: Tensor, ld_alpha: float) -> Tensor:
    """Weights of tokens that take the length of a response out of its log-prob. LD-DPO, Liu et al. 2024, arXiv
    2409.06411, Eq. 9: tokens up to the length of the shorter response of a pair count 1, what is longer ``ld_alpha``.

    Args:
        cu_responses: [S + 1], offsets of the responses in the rows: chosen_0, rejected_0, chosen_1, ... Best on the
            CPU: on a GPU the call waits for it.
        ld_alpha: in [0, 1]; 1 is DPO.

    Returns:
        float32 [T] on the device of the offsets, for ``linear_dpo_loss(token_weights=...)``. The reference log-probs
        are sums with these weights, too.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1]; got {ld_alpha}")
    lengths_S = cu_responses.diff().long()
    shared_S = lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    place_T = torch.arange(int(lengths_S.sum()), device=lengths_S.device)
    place_T = place_T - (cu_responses[:-1].long()).repeat_interleave(lengths_S)
    return torch.where(place_T < shared_S.repeat_interleave(lengths_S), 1.0, ld_alpha)


def plackett_luce_loss(logps_BK: Tensor, ref_logps_BK: Tensor, *, beta: float = 0.1) -> PlackettLuceLoss:
    """Loss of full rankings: -sum_k [ r_k - logsumexp_{j >= k} r_j ]. DPO under Plackett-Luce, arXiv 2305.18290, A.3.

    Args:
        logps_BK: [B, K], log-probs of the K >= 2 responses of a prompt, best first, summed over completion tokens.
        ref_logps_BK: [B, K], the same under the reference.
        beta: strength of the pull to the reference.

    Returns:
        ``PlackettLuceLoss(loss [B], rewards [B, K])``; rewards are detached. For K = 2 the loss has the bits of
        ``preference_loss(..., loss_type="sigmoid")``.

    Raises:
        ValueError: shapes that differ, fewer than two responses, beta not positive.
    """
    check_options(LossOptions(beta=beta))
    if logps_BK.ndim != 2 or logps_BK.shape[1] < 2:
        raise ValueError(f"logps_BK must have shape [prompts, responses >= 2]; got {list(logps_BK.shape)}")
    if ref_logps_BK.shape != logps_BK.shape:
        raise ValueError(f"ref_logps_BK must have shape {list(logps_BK.shape)}; got {list(ref_logps_BK.shape)}")
    dtype = torch.promote_types(logps_BK.dtype, torch.float32)
    rewards_BK = beta * (logps_BK.to(dtype) - ref_logps_BK.to(dtype))
    # r_k - logsumexp_{j>=k} r_j is logsigmoid(r_k - logsumexp_{j>k} r_j), which is DPO's own formula when one is left.
    *better, rest = rewards_BK.unbind(dim=1)
    loss = torch.zeros_like(rest)
    for reward in reversed(better):
        loss = loss - F.logsigmoid(reward - rest)
        rest = torch.logaddexp(reward, rest)
    return PlackettLuceLoss(loss, rewards_BK.detach())
