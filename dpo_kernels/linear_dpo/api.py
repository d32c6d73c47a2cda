"""``linear_dpo_loss``: a preference loss of hidden states under a linear head, without the logits matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype
from dpo_kernels.dispatch import check_impl
from dpo_kernels.head import Head, HeadOptions
from dpo_kernels.linear_dpo.interface import make_pairs
from dpo_kernels.linear_dpo.ops import Inputs, linear_dpo_op, reduce_losses, response_sums
from dpo_kernels.linear_logps.api import check_weight_grad, linear_logps, named_stats
from dpo_kernels.linear_logps.ops import head_fields
from dpo_kernels.linear_logps.stats import STATS, check_stats
from dpo_kernels.losses import LossMix, LossOptions, check_options, resolve_loss, resolve_mean_length

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = ("mean", "sum", "none")


class LinearDPOLoss(NamedTuple):
    """Legend: P pairs, S = 2 P responses. Everything but ``loss`` is detached; float32 (float64 for float64 inputs)."""

    loss: Tensor
    """Scalar for reduction "mean" and "sum", [P] for "none"."""
    pair_losses: Tensor
    """[P], before pair weights."""
    logps: Tensor
    """[S], log-probs summed over the tokens of each response."""
    chosen_rewards: Tensor
    """[P]"""
    rejected_rewards: Tensor
    """[P]"""


class LinearDPOLossStats(NamedTuple):
    """``LinearDPOLoss`` together with the statistics of tokens that were asked for."""

    loss: Tensor
    pair_losses: Tensor
    logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    stats: dict[str, Tensor]
    """name -> [T], detached."""


class _Options(HeadOptions, total=False):
    """The keywords of ``linear_dpo_loss`` but ``stats``, which decides what it returns."""

    loss_type: str | Sequence[str]
    loss_weights: Sequence[float] | None
    beta: float
    label_smoothing: float
    discopop_tau: float
    simpo_gamma: float
    cpo_alpha: float
    mean_chosen_length: float | None
    ignore_index: int
    pair_weights: Tensor | None
    reduction: str
    weight_grad: Tensor | None
    impl: str


@overload
def linear_dpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    cu_responses: Tensor,
    ref_logps_S: Tensor | None,
    *,
    stats: None = ...,
    **options: Unpack[_Options],
) -> LinearDPOLoss: ...


@overload
def linear_dpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    cu_responses: Tensor,
    ref_logps_S: Tensor | None,
    *,
    stats: Sequence[str],
    **options: Unpack[_Options],
) -> LinearDPOLossStats: ...


def linear_dpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    cu_responses: Tensor,
    ref_logps_S: Tensor | None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    mean_chosen_length: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
    weight_grad: Tensor | None = None,
    stats: Sequence[str] | None = None,
    impl: str = "auto",
) -> LinearDPOLoss | LinearDPOLossStats:
    """Preference loss of pairs of responses, straight from hidden states. Rows are the completion tokens of all
    responses laid end to end, in order chosen_0, rejected_0, chosen_1, rejected_1, ...

    The same numbers as ``linear_logps``, summed per response, in ``preference_loss``, at less work. In units of one
    2 T D V product: 3 for loss and gradients with a trainable head and reduction "mean" or "sum"; 2 with a frozen head;
    1 without gradients; 4 for reduction "none" and for the losses that couple pairs (``aot``, ``aot_unpaired``), where
    the gradient is formed in backward, exact for any upstream gradient.

    Args:
        hidden_TD: [T, D], bfloat16, float16, float32 or float64; the hidden state that predicts each label.
        weight_VD: [V, D], same dtype and device.
        labels_T: [T], int64 or int32, in [0, V) or ``ignore_index``.
        cu_responses: [S + 1], int32 or int64, offsets of the responses in the rows, from 0 to T; S is even. Best on the
            CPU: on a GPU the call waits for it. Responses may be empty: log-prob 0, length counted as 1.
        ref_logps_S: [S], reference log-probs summed per response, any float dtype, in the order of the responses; None
            for losses without a reference.
        loss_type, loss_weights, beta, label_smoothing, discopop_tau, simpo_gamma, cpo_alpha, mean_chosen_length: as in
            ``preference_loss``. Lengths are the numbers of labels of each response that are not ignored.
        bias, softcap, logit_scale, temperature, ignore_index: as in ``linear_logps``.
        pair_weights: [P] or None. "mean" is sum(weight * loss) / P, "sum" is sum(weight * loss), "none" the products.
        reduction: "mean", "sum" or "none". Without pairs "mean" is 0.
        weight_grad: as in ``linear_logps``; but in 3 products, the gradient waits for the upstream factor in the dtype
            of a bfloat16 weight, so that this call's share is rounded to it before it is added: once, or by the Triton
            kernels once a chunk where up to four chunks are summed in place.
        stats: names of statistics of each row's distribution, as in ``linear_logps``: "entropy", "is_top1",
            "mean_logits", "log_sum_sq_probs". They come from the logits of the loss: no further product. In torch they
            leave the bits of the loss and of its gradients as they are; the Triton kernels take other tile shapes with
            them, so that both are the same to rounding.
        impl: as in ``linear_logps``.

    Returns:
        ``LinearDPOLoss(loss, pair_losses, logps, chosen_rewards, rejected_rewards)``. With ``stats``, even an empty
        sequence of them, ``LinearDPOLossStats``: the same, and ``stats``, name -> [T], as ``linear_logps`` gives them.

    Under autocast the inputs are cast like those of a matrix product. Results and gradients have the same bits on every
    run on the same machine. There is no second derivative.

    Raises:
        ValueError: shapes, dtypes, devices, offsets or numbers that do not fit, an unknown loss, a missing reference.
        RuntimeError: an ``impl`` that cannot run here.
    """
    check_impl(impl)
    mix = resolve_loss(loss_type, loss_weights)
    options = LossOptions(beta, label_smoothing, discopop_tau, simpo_gamma, cpo_alpha)
    check_options(options)
    names = check_stats(stats or (), STATS)
    check_weight_grad(weight_grad, weight_VD)
    hidden_TD, head = Head(weight_VD, bias, softcap, logit_scale, temperature).autocast(hidden_TD)
    head.check(hidden_TD, labels_T)
    _check_pairs(hidden_TD, cu_responses, ref_logps_S, pair_weights, mix, reduction)

    dtype = accumulation_dtype(hidden_TD.dtype)
    ref_logps_S = None if ref_logps_S is None else ref_logps_S.detach().to(dtype)
    pair_weights = None if pair_weights is None else pair_weights.detach().to(dtype)
    lengths_S = response_sums((labels_T != ignore_index).to(dtype), cu_responses) if mix.needs_lengths else None
    mean_length = resolve_mean_length(mean_chosen_length, None if lengths_S is None else lengths_S[0::2])
    fused = torch.is_grad_enabled() and head.trainable and reduction != "none" and not mix.couples_pairs
    if fused:
        if isinstance(mean_length, float | int):
            mean_length = hidden_TD.new_full((), mean_length, dtype=dtype)
        inputs = Inputs(
            hidden=hidden_TD,
            labels=labels_T,
            cu_responses=cu_responses,
            ref_logps=ref_logps_S,
            lengths=lengths_S,
            mean_length=mean_length,
            pair_weights=pair_weights,
            **head_fields(head),
            loss_type=",".join(t.name for t in mix.types),
            loss_weights=list(mix.weights),
            loss_options=list(options),
            mean=reduction == "mean",
            ignore_index=ignore_index,
            impl=impl,
            need_hidden=hidden_TD.requires_grad,
            need_weight=head.weight_VD.requires_grad,
            need_bias=head.bias_V is not None and head.bias_V.requires_grad,
            weight_grad=weight_grad,
            stats=",".join(names),
        )
        loss, losses_P, logps_S, *_, stats_KT = linear_dpo_op(*inputs)
        found = named_stats(names, stats_KT)
    else:
        logps_T, found = linear_logps(
            hidden_TD,
            head.weight_VD,
            labels_T,
            **head.options,
            ignore_index=ignore_index,
            weight_grad=weight_grad if torch.is_grad_enabled() else None,
            stats=names,
            impl=impl,
        )
        logps_S = response_sums(logps_T, cu_responses)
        losses_P = mix.losses(make_pairs(logps_S, ref_logps_S, lengths_S, mean_length, options))
        if reduction == "none":
            loss = losses_P if pair_weights is None else losses_P * pair_weights
        else:
            loss = reduce_losses(losses_P, pair_weights, reduction == "mean")
    logps_S = logps_S.detach()
    rewards = mix.rewards(make_pairs(logps_S, ref_logps_S, lengths_S, mean_length, options))
    out = LinearDPOLoss(loss, losses_P.detach(), logps_S, *rewards)
    return out if stats is None else LinearDPOLossStats(*out, found)


def _check_pairs(
    hidden_TD: Tensor,
    cu_responses: Tensor,
    ref_logps_S: Tensor | None,
    pair_weights: Tensor | None,
    mix: LossMix,
    reduction: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if cu_responses.ndim != 1 or cu_responses.shape[0] % 2 == 0:
        raise ValueError(
            f"cu_responses must have shape [responses + 1], with two responses per pair; got {list(cu_responses.shape)}"
        )
    if cu_responses.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_responses must be int32 or int64; got {cu_responses.dtype}")
    if cu_responses.device.type != "cpu" and cu_responses.device != hidden_TD.device:
        raise ValueError(
            f"cu_responses must be on the CPU or on the device of hidden, {hidden_TD.device}; got {cu_responses.device}"
        )
    S = cu_responses.shape[0] - 1
    if ref_logps_S is None:
        if mix.needs_reference:
            raise ValueError(f"loss_type {mix.names} needs ref_logps_S, a log-prob per response; got None")
    elif ref_logps_S.ndim != 1 or ref_logps_S.shape[0] != S:
        raise ValueError(f"ref_logps_S must have shape [{S}], one per response; got {list(ref_logps_S.shape)}")
    elif ref_logps_S.device != hidden_TD.device:
        raise ValueError(f"ref_logps_S must be on the device of hidden, {hidden_TD.device}; got {ref_logps_S.device}")
    if pair_weights is not None and (pair_weights.ndim != 1 or pair_weights.shape[0] != S // 2):
        raise ValueError(f"pair_weights must have shape [{S // 2}], one per pair; got {list(pair_weights.shape)}")
    if pair_weights is not None and pair_weights.device != hidden_TD.device:
        raise ValueError(f"pair_weights must be on the device of hidden, {hidden_TD.device}; got {pair_weights.device}")
