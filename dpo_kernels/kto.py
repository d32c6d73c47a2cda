"""KTO: rows that are each desirable or not, one response a prompt, instead of pairs. Ethayarajh et al. 2024,
arXiv 2402.01306, as TRL 1.16 defines it.

Legend: T rows (tokens), D features, V vocabulary, B responses, S = 2 B slots of pairs.

The reward of a response is measured from that of a typical one, beta times an estimate of the divergence between policy
and reference. So KTO is APO-zero (``losses.py``) of a reference that is as much more probable, with each response alone
in its pair: that is how ``linear_kto_loss`` is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype, to_device
from dpo_kernels.linear_dpo.api import linear_dpo_loss
from dpo_kernels.pairs import LossOptions, check_options

if TYPE_CHECKING:
    from collections.abc import Sequence

KTO_LOSSES = ("kto", "apo_zero_unpaired")
"""Names as in TRL: with the divergence, and with 0 in its place."""
ALONE = 0.5
"""What APO-zero gives for a response that is not there: sigmoid(0)."""


class KTOLoss(NamedTuple):
    """Per response, unreduced. Only ``loss`` carries gradients."""

    loss: Tensor
    rewards: Tensor


class LinearKTOLoss(NamedTuple):
    """Everything but ``loss`` is detached; float32 (float64 for float64 inputs)."""

    loss: Tensor
    """Scalar for reduction "mean" and "sum", [B] for "none"."""
    response_losses: Tensor
    """[B], weighted."""
    logps: Tensor
    """[B], log-probs summed over the tokens of each response."""
    rewards: Tensor
    """[B], beta times the log-ratio."""
    stats: dict[str, Tensor]
    """name -> [T], of the statistics that were asked for."""


def kto_divergence(logps_N: Tensor, ref_logps_N: Tensor) -> Tensor:
    """The estimate of the divergence between policy and reference that ``kto`` measures rewards from: the mean
    log-ratio of completions under prompts that they do not belong to, but at least 0.

    Args:
        logps_N, ref_logps_N: [N], log-probs summed over the tokens of each mismatched completion. By TRL's custom the
            completions of a step, each under the prompt of the next.

    Returns:
        A number, detached, float32 (float64 for float64); 0 of none.
    """
    dtype = torch.promote_types(logps_N.dtype, torch.float32)
    ratios_N = logps_N.detach().to(dtype) - ref_logps_N.detach().to(dtype)
    return (ratios_N.sum() / max(1, len(ratios_N))).clamp(min=0)


def kto_loss(
    logps_B: Tensor,
    ref_logps_B: Tensor,
    desirable_B: Tensor,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    divergence: Tensor | None = None,
) -> KTOLoss:
    """w (1 - sigmoid(r - beta z)) of desirable responses and w (1 - sigmoid(beta z - r)) of the others, r = beta times
    the log-ratio, z the divergence and w the weight of the side. Equations 7 and 8 of arXiv 2402.01306.

    Args:
        logps_B, ref_logps_B: [B], log-probs summed over completion tokens, in nats.
        desirable_B: [B], bool.
        loss_type: "kto", or "apo_zero_unpaired" for z = 0 (arXiv 2408.06266).
        divergence: one number, ``kto_divergence``; for "kto" alone, which needs it.

    Returns:
        ``KTOLoss(loss [B], rewards [B])``, float32 (float64 for float64 inputs). Rewards are detached, without z.

    Raises:
        ValueError: shapes that differ, an unknown loss, numbers out of range, a divergence that is missing or not read.
    """
    _check(loss_type, beta, desirable_weight, undesirable_weight, divergence)
    if logps_B.ndim != 1 or not logps_B.shape == ref_logps_B.shape == desirable_B.shape:
        shapes = ", ".join(str(list(values.shape)) for values in (logps_B, ref_logps_B, desirable_B))
        raise ValueError(f"logps, ref_logps and desirable must all have shape [responses]; got {shapes}")
    if desirable_B.dtype != torch.bool:
        raise ValueError(f"desirable must be bool; got {desirable_B.dtype}")
    dtype = torch.promote_types(logps_B.dtype, torch.float32)
    ratios_B = logps_B.to(dtype) - ref_logps_B.detach().to(dtype)
    rewards_B = beta * (ratios_B if divergence is None else ratios_B - divergence.detach().reshape(()))
    losses_B = torch.sigmoid(torch.where(desirable_B, -rewards_B, rewards_B))
    weights_B = _side_weights(desirable_B, dtype, desirable_weight, undesirable_weight)
    return KTOLoss(losses_B * weights_B, beta * ratios_B.detach())


def linear_kto_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    cu_responses: Tensor,
    ref_logps_B: Tensor,
    desirable_B: Tensor,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    divergence: Tensor | None = None,
    response_weights: Tensor | None = None,
    stats: Sequence[str] = (),
    **options,
) -> LinearKTOLoss:
    """``kto_loss`` straight from hidden states, at the work of ``linear_dpo_loss``: three products with all gradients.

    Args:
        hidden_TD, weight_VD, labels_T: as in ``linear_dpo_loss``; rows are the completion tokens of all responses.
        cu_responses: [B + 1], offsets of the responses, best on the CPU.
        ref_logps_B: [B], reference log-probs of the responses.
        desirable_B: [B], bool, on the device of ``cu_responses``.
        loss_type, beta, desirable_weight, undesirable_weight, divergence: as in ``kto_loss``.
        response_weights: [B] or None, further factors of the losses.
        stats: as in ``linear_dpo_loss``.
        options: ``bias``, ``softcap``, ``logit_scale``, ``temperature``, ``ignore_index``, ``token_weights``,
            ``reduction``, ``weight_grad`` and ``impl``, as in ``linear_dpo_loss``.

    Raises:
        ValueError: as ``kto_loss`` and ``linear_dpo_loss``.
        TypeError: an option that has no meaning for single responses.
    """
    _check(loss_type, beta, desirable_weight, undesirable_weight, divergence)
    if unknown := sorted(options.keys() - _OPTIONS):
        raise TypeError(f"linear_kto_loss() got an unexpected keyword argument {unknown[0]!r}")
    B, device = desirable_B.shape[0] if desirable_B.ndim else 0, hidden_TD.device
    if desirable_B.dtype != torch.bool or desirable_B.ndim != 1:
        raise ValueError(f"desirable must be bool [responses]; got {desirable_B.dtype} {list(desirable_B.shape)}")
    if cu_responses.ndim != 1 or cu_responses.shape[0] != B + 1 or ref_logps_B.shape != desirable_B.shape:
        raise ValueError(
            f"cu_responses must have shape [{B + 1}] and ref_logps [{B}], for {B} responses; got "
            f"{list(cu_responses.shape)} and {list(ref_logps_B.shape)}"
        )
    dtype = accumulation_dtype(hidden_TD.dtype)
    # In its pair a desirable response is the chosen one, beside a rejected one without tokens; the others reversed.
    middle_B = torch.where(desirable_B, cu_responses[1:], cu_responses[:-1])
    cu_slots = torch.cat([torch.stack([cu_responses[:-1], middle_B], 1).flatten(), cu_responses[-1:]])
    chosen_B = to_device(desirable_B, device)
    shifted_B = ref_logps_B.detach().to(dtype)
    if divergence is not None:
        shifted_B = shifted_B + divergence.detach().reshape(())
    nothing_B = torch.zeros_like(shifted_B)
    ref_S = torch.stack([torch.where(chosen_B, shifted_B, nothing_B), torch.where(chosen_B, nothing_B, shifted_B)], 1)
    weights_B = _side_weights(chosen_B, dtype, desirable_weight, undesirable_weight)
    weights_B = weights_B if response_weights is None else weights_B * response_weights.detach()
    out = linear_dpo_loss(
        hidden_TD, weight_VD, labels_T, cu_slots, ref_S.flatten(), loss_type="apo_zero", beta=beta,
        pair_weights=weights_B, stats=stats, **options,
    )  # fmt: skip
    reduction = options.get("reduction", "mean")
    absent_B = ALONE * weights_B
    absent = absent_B if reduction == "none" else absent_B.sum() / (max(1, B) if reduction == "mean" else 1)
    logps_B = out.logps.view(B, 2).sum(1)
    rewards_B = beta * (logps_B - ref_logps_B.detach().to(dtype))
    return LinearKTOLoss(out.loss - absent, (out.pair_losses - ALONE) * weights_B, logps_B, rewards_B, out.stats)


def _side_weights(
    desirable_B: Tensor, dtype: torch.dtype, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """[B]: the weight of each response's side, made on its device without a copy from the host."""
    return torch.full_like(desirable_B, undesirable_weight, dtype=dtype).masked_fill(desirable_B, desirable_weight)


_OPTIONS = frozenset({
    "bias", "softcap", "logit_scale", "temperature", "ignore_index", "token_weights", "reduction", "weight_grad",
    "impl",
})  # fmt: skip
"""Keywords of ``linear_dpo_loss`` that single responses have, too."""


def _check(
    loss_type: str, beta: float, desirable_weight: float, undesirable_weight: float, divergence: Tensor | None
) -> None:
    if loss_type not in KTO_LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(KTO_LOSSES)}; got {loss_type!r}")
    check_options(LossOptions(beta=beta))
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be finite and not negative; got {weight}")
    if (divergence is None) == (loss_type == "kto"):
        needs = "needs" if loss_type == "kto" else "does not read"
        raise ValueError(f"loss_type {loss_type} {needs} a divergence; got {'None' if divergence is None else 'one'}")
    if divergence is not None and divergence.numel() != 1:
        raise ValueError(f"divergence must be one number; got shape {list(divergence.shape)}")
