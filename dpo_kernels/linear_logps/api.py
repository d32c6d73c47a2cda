"""``linear_logps``: log-probs of labels under a linear head, without the logits matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype
from dpo_kernels.dispatch import check_impl
from dpo_kernels.head import Head, HeadOptions
from dpo_kernels.linear_logps.ops import Inputs, head_fields, linear_logps_op
from dpo_kernels.linear_logps.stats import check_stats
from dpo_kernels.linear_logps.tile_filter import FILTER_STATS, check_filter_mass

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_weight_grad(weight_grad: Tensor | None, weight_VD: Tensor) -> None:
    """Raise ValueError for a main gradient that the gradient of this weight cannot be added to.

    The weight is the caller's: what autocast makes of it requires no gradient where none is recorded.
    """
    if weight_grad is None:
        return
    shape, dtype = list(weight_VD.shape), accumulation_dtype(weight_VD.dtype)
    if list(weight_grad.shape) != shape or weight_grad.dtype != dtype or weight_grad.device != weight_VD.device:
        raise ValueError(
            f"weight_grad must be {dtype} of shape {shape} on {weight_VD.device}, like weight; got"
            f" {weight_grad.dtype} of shape {list(weight_grad.shape)} on {weight_grad.device}"
        )
    if not weight_VD.requires_grad or weight_grad.requires_grad:
        raise ValueError("weight_grad needs a weight that requires a gradient, and must not require one itself")


class TokenLogps(NamedTuple):
    """Log-probs together with the statistics that were asked for."""

    logps: Tensor
    """[T], what ``linear_logps`` returns alone."""
    stats: dict[str, Tensor]
    """name -> [T], detached."""


class _Options(HeadOptions, total=False):
    """The keywords of ``linear_logps`` but ``stats``, which decides what it returns."""

    ignore_index: int
    weight_grad: Tensor | None
    filter_mass: float | None
    impl: str


@overload
def linear_logps(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, stats: None = ..., **options: Unpack[_Options]
) -> Tensor: ...


@overload
def linear_logps(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, stats: Sequence[str], **options: Unpack[_Options]
) -> TokenLogps: ...


def linear_logps(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    weight_grad: Tensor | None = None,
    filter_mass: float | None = None,
    stats: Sequence[str] | None = None,
    impl: str = "auto",
) -> Tensor | TokenLogps:
    """Log-prob of every label, log softmax(z)[label].

    z = softcap * tanh(logit_scale * (x W^T + b) / softcap) / temperature, the tanh only with a softcap.
    Equal to ``-F.cross_entropy(logits.float(), labels, reduction="none")`` with logits that were never rounded to 16
    bits, and differentiable for any gradient per token. The [T, V] matrix is never held. Memory and work: 1 product of
    2 T D V operations forward; 3 more backward (one recomputes the logits); with neither weight nor bias requiring a
    gradient 2 forward and none backward.

    Args:
        hidden_TD: [T, D], bfloat16, float16, float32 or float64; the hidden state that predicts each label. T may be 0.
        weight_VD: [V, D], same dtype and device.
        labels_T: [T], int64 or int32, in [0, V) or ``ignore_index``.
        bias: [V] or None, same dtype.
        softcap: final-logit softcap (Gemma 2), or None.
        logit_scale: factor of the raw logits (Cohere, Granite), before the softcap.
        temperature: divisor of the logits, after the softcap.
        ignore_index: rows with this label give exactly 0 and get exactly zero gradient.
        weight_grad: [V, D], float32 (float64 for float64 inputs), or None. Backward adds the gradient of the weight to
            it in place, every time it runs, and hands none to the weight: ``weight.grad`` stays as it is and hooks of
            the weight see nothing, as with Megatron's ``main_grad``. Averaging it over processes is the caller's.
            The product accumulates there: nothing is rounded to 16 bits.
        filter_mass: None for the exact gradient, or the largest probability mass of a row, in [0, 1), that its gradient
            may leave out. Tiles of 128 columns are left out, smallest first and never one with the label, while the sum
            of what a row loses stays within it; which they are is known from the forward product, and backward does
            not compute them. The gradient of the logits, g (onehot - p) dz/da for an upstream gradient g and
            a = x W^T + b, is then off by g p dz/da on columns of mass m <= filter_mass, so in L1 norm by at most
            |g| m |logit_scale / temperature|, and the gradient of the row of ``hidden`` by that times the longest row
            of ``weight``. That is of what backward is given: the log-probs stay exact. A flat softmax has no tiles that
            fit the budget together; its gradient then stays exact, and costs more than without a filter. Work: 1
            product forward, and backward 3 s (2 s with a frozen head), with s the share of tiles that are kept.
        stats: names of statistics of each row's distribution, gathered from the logits of the forward product; no
            further product. "entropy": -sum p log p, in nats. "is_top1": whether the label has the largest logit, the
            first of them where several are equal; False where the log-prob is nan. "mean_logits": mean of z over V.
            "log_sum_sq_probs": log sum p^2.
            With ``filter_mass`` also "dropped_mass": the mass m that backward leaves out of this row, and "kept_tiles":
            the share of the row's tiles that backward computes, whose mean over all rows is s. Rows are filtered in
            blocks of 128 on a GPU, where an ignored row costs, and reports, what its block costs; on the CPU one by
            one.
        impl: "auto", "triton", "torch", "native" or "reference". What is asked for by name is used or refused.

    Returns:
        [T], float32 (float64 for float64 inputs), in nats. With ``stats``, even an empty sequence of them,
        ``TokenLogps(logps, stats)``: the same, and name -> [T] in the same dtype (``is_top1`` is bool), without
        gradient, 0 (False) on ignored rows but for "kept_tiles" on a GPU.

    Under autocast the inputs are cast like those of a matrix product. The result and the gradients have the same bits
    on every run on the same machine. There is no second derivative.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit; on the CPU also a label out of range (on a GPU
            that is a device-side assertion, which needs no synchronisation).
        RuntimeError: an ``impl`` that cannot run here, or has not got the statistics or the filter asked for.
    """
    check_impl(impl)
    names = check_stats(stats or ())
    check_filter_mass(filter_mass, names)
    check_weight_grad(weight_grad, weight_VD)
    hidden_TD, head = Head(weight_VD, bias, softcap, logit_scale, temperature).autocast(hidden_TD)
    head.check(hidden_TD, labels_T)
    differentiated = torch.is_grad_enabled() and (hidden_TD.requires_grad or head.trainable)
    if not differentiated and not any(name in FILTER_STATS for name in names):
        filter_mass = None
    inputs = Inputs(
        hidden=hidden_TD,
        labels=labels_T,
        **head_fields(head),
        ignore_index=ignore_index,
        impl=impl,
        need_dx=differentiated and not head.trainable and filter_mass is None,
        stats=",".join(names),
        weight_grad=weight_grad,
        filter_mass=filter_mass,
    )
    logps_T, _, _, stats_KT, _, _ = linear_logps_op(*inputs)
    if stats is None:
        return logps_T
    return TokenLogps(logps_T, named_stats(names, stats_KT))


def named_stats(names: Sequence[str], stats_KT: Tensor) -> dict[str, Tensor]:
    """name -> [T] from the rows of an op's result."""
    found = dict(zip(names, stats_KT.unbind(0), strict=True))
    return {name: values.bool() if name == "is_top1" else values for name, values in found.items()}
