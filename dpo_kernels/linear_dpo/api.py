"""``linear_dpo_loss``: a preference loss of hidden states under a linear head, without the logits matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype
from dpo_kernels.dispatch import check_impl, choose
from dpo_kernels.head import Head, HeadOptions
from dpo_kernels.linear_dpo.interface import make_pairs
from dpo_kernels.linear_dpo.ops import OFFSETS_WANTED, Inputs, linear_dpo_op, reduce_losses, response_sums
from dpo_kernels.linear_logps.api import check_weight_grad, linear_logps, named_stats
from dpo_kernels.linear_logps.ops import head_fields
from dpo_kernels.linear_logps.stats import STATS, check_stats
from dpo_kernels.losses import LossMix, check_mix, resolve_loss, resolve_mean_length
from dpo_kernels.pairs import LossOptions, Pairs, make_options

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
    dpop_lambda: float
    shift_lambda: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    mean_chosen_length: float | None
    ignore_index: int
    pair_weights: Tensor | None
    margins: Tensor | None
    token_weights: Tensor | None
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
    dpop_lambda: float = 50.0,
    shift_lambda: float = 0.95,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    mean_chosen_length: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    pair_weights: Tensor | None = None,
    margins: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    weight_grad: Tensor | None = None,
    stats: Sequence[str] | None = None,
    impl: str = "auto",
) -> LinearDPOLoss | LinearDPOLossStats:
    """Preference loss of pairs of responses, straight from hidden states. Rows are the completion tokens of all
    responses laid end to end, in order chosen_0, rejected_0, chosen_1, rejected_1, ...

    The same numbers as ``linear_logps``, summed per response, in ``preference_loss``, at less work. In units of one
    2 T D V product: 3 for loss and gradients with a trainable head and reduction "mean" or "sum"; 2 with a frozen head;
    1 without gradients; 4 for reduction "none", for the losses that couple pairs (``aot``, ``aot_unpaired``), and for
    token weights beside a likelihood term (``sft``, ``nll``, ``orpo``, ``cpo``), where the gradient is formed in
    backward, exact for any upstream gradient.

    Args:
        hidden_TD: [T, D], bfloat16, float16, float32 or float64; the hidden state that predicts each label.
        weight_VD: [V, D], same dtype and device.
        labels_T: [T], int64 or int32, in [0, V) or ``ignore_index``.
        cu_responses: [S + 1], int32 or int64, offsets of the responses in the rows, from 0 to T; S is even. Best on the
            CPU: on a GPU the call waits for it. Responses may be empty: log-prob 0, length counted as 1.
        ref_logps_S: [S], reference log-probs summed per response, any float dtype, in the order of the responses; None
            for losses without a reference.
        loss_type, loss_weights, beta, label_smoothing, discopop_tau, simpo_gamma, cpo_alpha, dpop_lambda, shift_lambda,
        f_divergence_type, f_alpha_divergence_coef, mean_chosen_length, margins ([P]): as in ``preference_loss``.
            Lengths are the numbers of labels of each response that are not ignored.
        bias, softcap, logit_scale, temperature, ignore_index: as in ``linear_logps``.
        pair_weights: [P] or None. "mean" is sum(weight * loss) / P, "sum" is sum(weight * loss), "none" the products.
        token_weights: [T] or None, constants: the log-prob of a response is sum(weight * log-prob of a token), as for
            LD-DPO (``ld_token_weights``) or tokens that matter more. ``ref_logps_S`` are such sums, too. A likelihood
            term reads tokens without them, and lengths count tokens whatever their weight: a token that is to be left
            out altogether has the label ``ignore_index``.
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
        TypeError: offsets that are no tensor.
        RuntimeError: an ``impl`` that cannot run here.
    """
    check_impl(impl)
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
    names = check_stats(stats or (), STATS)
    check_weight_grad(weight_grad, weight_VD)
    hidden_TD, head = Head(weight_VD, bias, softcap, logit_scale, temperature).autocast(hidden_TD)
    head.check(hidden_TD, labels_T)
    _check_pairs(hidden_TD, cu_responses, ref_logps_S, mix, reduction)
    num_pairs, device = cu_responses.shape[0] // 2, hidden_TD.device
    dtype = accumulation_dtype(hidden_TD.dtype)
    lengths_S = response_sums((labels_T != ignore_index).to(dtype), cu_responses) if mix.needs_lengths else None
    terms = _Terms(
        mix=mix,
        options=options,
        ref_logps_S=None if ref_logps_S is None else ref_logps_S.detach().to(dtype),
        lengths_S=lengths_S,
        mean_length=resolve_mean_length(mean_chosen_length, None if lengths_S is None else lengths_S[0::2]),
        pair_weights_P=_constants("pair_weights", pair_weights, num_pairs, "pair", device, dtype),
        margins_P=_constants("margins", margins, num_pairs, "pair", device, dtype),
        token_weights_T=_constants("token_weights", token_weights, len(hidden_TD), "row of hidden", device, dtype),
        reduction=reduction,
        ignore_index=ignore_index,
        weight_grad=weight_grad,
        stats=names,
        impl=impl,
    )
    one_scalar = reduction != "none" and not mix.couples_pairs and not terms.two_slopes
    fused = torch.is_grad_enabled() and head.trainable and one_scalar
    loss, losses_P, logps_S, found = (_fused if fused else _composed)(hidden_TD, head, labels_T, cu_responses, terms)
    rewards = mix.rewards(terms.pairs(logps_S.detach()))
    out = LinearDPOLoss(loss, losses_P.detach(), logps_S.detach(), *rewards)
    return out if stats is None else LinearDPOLossStats(*out, found)


class _Terms(NamedTuple):
    """What a call asks for beside head and rows, checked; constants in the accumulation dtype."""

    mix: LossMix
    options: LossOptions
    ref_logps_S: Tensor | None
    lengths_S: Tensor | None
    mean_length: Tensor | float | None
    pair_weights_P: Tensor | None
    margins_P: Tensor | None
    token_weights_T: Tensor | None
    reduction: str
    ignore_index: int
    weight_grad: Tensor | None
    stats: tuple[str, ...]
    impl: str

    @property
    def two_slopes(self) -> bool:
        """Whether the rows of one response have two slopes, one of them without the weight of the token."""
        return self.token_weights_T is not None and self.mix.likelihood

    def pairs(self, logps_S: Tensor, unweighted_chosen_P: Tensor | None = None) -> Pairs:
        given = (self.ref_logps_S, self.lengths_S, self.mean_length, self.options, self.margins_P)
        return make_pairs(logps_S, *given, unweighted_chosen_P)


_Found = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""The reduced loss, the losses of the pairs, the log-probs of the responses, statistics of tokens."""


def _fused(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    cu_responses: Tensor,
    terms: _Terms,
) -> _Found:
    """Loss and gradients in three products: the reduced loss has one scalar upstream gradient."""
    mean_length = terms.mean_length
    if isinstance(mean_length, float | int):
        mean_length = hidden_TD.new_full((), mean_length, dtype=accumulation_dtype(hidden_TD.dtype))
    inputs = Inputs(
        hidden=hidden_TD,
        labels=labels_T,
        cu_responses=cu_responses,
        ref_logps=terms.ref_logps_S,
        lengths=terms.lengths_S,
        mean_length=mean_length,
        pair_weights=terms.pair_weights_P,
        **head_fields(head),
        loss_type=",".join(t.name for t in terms.mix.types),
        loss_weights=list(terms.mix.weights),
        loss_options=list(terms.options),
        mean=terms.reduction == "mean",
        ignore_index=terms.ignore_index,
        impl=terms.impl,
        need_hidden=hidden_TD.requires_grad,
        need_weight=head.weight_VD.requires_grad,
        need_bias=head.bias_V is not None and head.bias_V.requires_grad,
        weight_grad=terms.weight_grad,
        stats=",".join(terms.stats),
        margins=terms.margins_P,
        token_weights=terms.token_weights_T,
    )
    loss, losses_P, logps_S, *_, stats_KT = linear_dpo_op(*inputs)
    return loss, losses_P, logps_S, named_stats(terms.stats, stats_KT)


def _composed(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    cu_responses: Tensor,
    terms: _Terms,
) -> _Found:
    """Log-probs of tokens, their sums, the loss: any gradient, in the products of ``linear_logps``."""
    if terms.impl != "auto" and not torch.compiler.is_compiling():
        # A refusal by linear_logps would name a function that was not called.
        choose("linear_logps", terms.impl, hidden_TD.device, hidden_TD.dtype, terms.stats, called="linear_dpo_loss")
    logps_T, found = linear_logps(
        hidden_TD,
        head.weight_VD,
        labels_T,
        **head.options,
        ignore_index=terms.ignore_index,
        weight_grad=terms.weight_grad if torch.is_grad_enabled() else None,
        stats=terms.stats,
        impl=terms.impl,
    )
    weights_T = terms.token_weights_T
    logps_S = response_sums(logps_T if weights_T is None else logps_T * weights_T, cu_responses)
    unweighted_P = response_sums(logps_T, cu_responses)[0::2] if terms.two_slopes else None
    losses_P = terms.mix.losses(terms.pairs(logps_S, unweighted_P))
    if terms.reduction == "none":
        loss = losses_P if terms.pair_weights_P is None else losses_P * terms.pair_weights_P
    else:
        loss = reduce_losses(losses_P, terms.pair_weights_P, terms.reduction == "mean")
    return loss, losses_P, logps_S, found


def _check_pairs(
    hidden_TD: Tensor,
    cu_responses: Tensor,
    ref_logps_S: Tensor | None,
    mix: LossMix,
    reduction: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not isinstance(cu_responses, Tensor):
        raise TypeError(
            f"cu_responses must be a tensor of offsets; got {type(cu_responses).__name__}; {OFFSETS_WANTED}"
        )
    if cu_responses.ndim != 1 or cu_responses.shape[0] % 2 == 0:
        raise ValueError(
            f"cu_responses must have shape [responses + 1], with two responses per pair; got "
            f"{list(cu_responses.shape)}; {OFFSETS_WANTED}"
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


def _constants(
    name: str, values: Tensor | None, size: int, of: str, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Constants of a call, detached, in ``dtype``."""
    if values is None:
        return None
    if values.ndim != 1 or values.shape[0] != size:
        raise ValueError(f"{name} must have shape [{size}], one per {of}; got {list(values.shape)}")
    if values.device != device:
        raise ValueError(f"{name} must be on the device of hidden, {device}; got {values.device}")
    return values.detach().to(dtype)
