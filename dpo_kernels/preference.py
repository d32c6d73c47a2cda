"""Preference losses of log-probs that are already there: pairs, and full rankings.

Legend: B pairs or prompts, K responses of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.losses import LossOptions, Pairs, check_options, resolve_loss, resolve_mean_length


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
    mean_chosen_length: float | None = None,
) -> PreferenceLoss:
    """Loss and rewards of preference pairs from the log-probs of their responses.

    Args:
        chosen_logps, rejected_logps: [B], log-probs summed over completion tokens, in nats, any float dtype. 16-bit
            values are raised to float32 first; float64 stays.
        ref_chosen_logps, ref_rejected_logps: [B], the same under the reference. May be None for ``sft``, ``simpo``,
            ``orpo`` and ``cpo``.
        loss_type: a name in ``LOSS_TYPES``, or several, whose losses are added with ``loss_weights`` (MPO, arXiv
            2411.10442).
        loss_weights: one factor per name; all 1 by default.
        beta: strength of the pull to the reference; the weight of the odds-ratio term in ``orpo``.
        label_smoothing: share of flipped labels, in [0, 0.5). Read by ``sigmoid`` (conservative DPO), ``robust``,
            ``exo_pair``, ``aot``, ``aot_unpaired``, ``simpo`` and ``cpo``; the others ignore it, as in TRL.
        chosen_lengths, rejected_lengths: [B], completion tokens. Needed by ``ipo``, ``sigmoid_norm``, ``sft``,
            ``simpo``, ``orpo`` and ``cpo``. An empty response counts as one token.
        discopop_tau: temperature of ``discopop``.
        simpo_gamma: target reward margin of ``simpo``.
        cpo_alpha: weight of the language-model term of ``cpo``.
        mean_chosen_length: tokens per chosen response over the whole batch, for ``sft`` when the batch is split over
            several calls; by default the mean of ``chosen_lengths``.

    Returns:
        ``PreferenceLoss(loss, chosen_rewards, rejected_rewards)``, each [B], float32 (float64 for float64 inputs).
        Rewards are detached: beta times the log-ratio, or the log-prob when no reference is given, or the log-prob per
        token for ``simpo`` and ``orpo``. ``aot`` losses are quantiles of the batch, not in the order of the pairs.

    Raises:
        ValueError: unknown loss, shapes that differ, missing reference or lengths, numbers out of range.
    """
    mix = resolve_loss(loss_type, loss_weights)
    options = LossOptions(beta, label_smoothing, discopop_tau, simpo_gamma, cpo_alpha)
    check_options(options)
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
    )
    return PreferenceLoss(mix.losses(pairs), *mix.rewards(pairs))


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
