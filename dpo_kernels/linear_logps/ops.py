"""``torch.library`` registration of ``linear_logps``: validity of labels, dispatch to an implementation, autograd.

Legend: T rows (tokens), D features, V vocabulary.

Logits are z = softcap * tanh(logit_scale * (x W^T + b) / softcap) / temperature, in that order; without a softcap
z = logit_scale * (x W^T + b) / temperature. The log-prob of a row is z[label] - logsumexp(z).

An implementation is a module beside this one with three plain functions. They run below autograd and with autocast
off, never see T == 0, and get: hidden_TD and weight_VD of one dtype (float64 only for ``reference`` and ``torch``) with
unit stride along D and any row stride; labels_T int64, contiguous, each in [0, V) or equal to ignore_index; bias_V
contiguous or None; softcap positive or None. They may not mutate an input, may not synchronise a CUDA device, and give
the same bits when run twice.

``why_not(device, dtype) -> str | None``
    (Triton only.) Reason this implementation cannot take such tensors, or None. Pure, and of no other argument: every
    shape must work.
``STATS``
    (Triton only.) Names of the token statistics that it computes; ``torch`` and ``reference`` compute all.
``FILTER_ROWS``
    Rows of the blocks in which it filters a backward.
``forward(hidden_TD, weight_VD, labels_T, bias_V, softcap, logit_scale, temperature, ignore_index, need_dx, stats,
tile_mass) -> (logps_T, lse_T, dx_TD | None, stats_KT | None, mass_TC | None)``
    logps_T is float32 (float64 for float64 inputs). Logits reach the log-sum-exp in that precision, never rounded to
    16 bits. lse_T is float32 or float64; it is kept and handed back as float64, because near 1e4 a float32 is too
    coarse to give softmax = e^(z - lse) back. Ignored rows have logps exactly 0 and any finite lse. With ``need_dx``
    (frozen head) dx_TD is d logps_t / d hidden_t in hidden's dtype, exactly 0 on ignored rows; its rows are scaled by
    the upstream gradient later. ``stats`` are K names of ``dpo_kernels.linear_logps.stats``; where there are some,
    stats_KT has the dtype of logps_T and is exactly 0 on ignored rows. With ``tile_mass`` (never with ``need_dx``)
    mass_TC is the softmax summed over tiles of ``tile_filter.COLUMNS`` columns, with or without the label's own, and
    anything on ignored rows.
``backward(grad_logps_T, hidden_TD, weight_VD, labels_T, lse_T, bias_V, softcap, logit_scale, temperature,
ignore_index, need_hidden, need_weight, need_bias, weight_grad_VD, tiles) -> (dX_TD | None, dW_VD | None, db_V |
None)``
    Gradients in the dtypes of hidden, weight and bias, accumulated in float32 (float64) and rounded once. grad_logps_T
    is float32 (float64), contiguous, non-uniform, and may be anything on ignored rows, which contribute exactly 0. Of
    a slice of a larger vocabulary (not for ``reference``) lse_T is the whole one's, and -1 is a label elsewhere. What
    is not needed is not computed and returned as None. With weight_grad_VD, float32 (float64) of any strides, dW is
    added to it unrounded, and None returned in its place. With ``tiles``, a ``tile_filter.Kept`` of FILTER_ROWS rows
    a block, the gradient of the logits is taken as 0 in all other tiles, and no product of them is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype, exact_products
from dpo_kernels.dispatch import implementation
from dpo_kernels.linear_logps.tile_filter import (
    FILTER_STATS,
    FilterPlan,
    Kept,
    filter_stats,
    num_blocks,
    num_tiles,
    plan_filter,
)

_OPTIONS = "float? softcap, float logit_scale, float temperature, int ignore_index, str impl"


def check_labels(labels_T: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise where a label is neither in [0, V) nor ``ignore_index``; on a GPU without waiting for it."""
    bad_T = ((labels_T < 0) | (labels_T >= num_classes)) & (labels_T != ignore_index)
    if labels_T.device.type == "cuda":
        torch._assert_async(
            ~bad_T.any(), f"a label is outside [0, {num_classes}) and is not ignore_index {ignore_index}"
        )
    elif bool(bad_T.any()):
        row = int(bad_T.nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {num_classes}) or {ignore_index} (ignored); got {int(labels_T[row])} at index {row}"
        )


def split_stats(stats: str) -> tuple[str, ...]:
    return tuple(stats.split(",")) if stats else ()


def unit_stride(matrix: Tensor) -> Tensor:
    """The same matrix with unit stride along its last dimension; a copy only when it has to be."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def empty_gradients(
    inputs: Sequence[Any], needs: Sequence[bool], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """What a fake backward returns: a tensor like each input, and an empty vector for what is not needed."""
    hidden = inputs[0]
    wanted = zip(inputs, needs, strict=True)
    return tuple(t.new_empty(t.shape, dtype=dtype) if need else hidden.new_empty(0, dtype=dtype) for t, need in wanted)


def refuse_double_backward(name: str) -> None:
    """The gradient formulas below are not differentiable themselves; a graph through them would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: call backward() or autograd.grad() without create_graph=True"
        )


@torch.library.custom_op(
    "dpo_kernels::linear_logps",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {_OPTIONS}, bool need_dx, str stats,"
    " Tensor? weight_grad=None, float? filter_mass=None)"
    " -> (Tensor logps, Tensor lse, Tensor dx, Tensor stats, Tensor order, Tensor kept)",
)
def linear_logps_op(
    hidden,
    weight,
    labels,
    bias,
    softcap,
    logit_scale,
    temperature,
    ignore_index,
    impl,
    need_dx,
    stats,
    weight_grad=None,
    filter_mass=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx is empty, [0, D], unless ``need_dx``; stats is [K, T] for the K names in ``stats``, joined by commas.

    ``weight_grad`` is for backward, which adds dW to it. order and kept are the parts of a ``tile_filter.Kept``, empty
    without ``filter_mass``.
    """
    names = split_stats(stats)
    token_names = tuple(name for name in names if name not in FILTER_STATS)
    module = implementation("linear_logps", impl, hidden, token_names, filter_mass is not None)
    check_labels(labels, weight.shape[0], ignore_index)
    (T, D), V = hidden.shape, weight.shape[0]
    no_tiles = Kept(labels.new_zeros(0, dtype=torch.int64), _no_tiles(labels, V, filter_mass))
    if T == 0:
        logps = hidden.new_zeros(0, dtype=accumulation_dtype(hidden.dtype))
        lse, dx = logps.new_zeros(0, dtype=torch.float64), hidden.new_zeros(0, D)
        return logps, lse, dx, logps.new_zeros(len(names), 0), *no_tiles
    labels = labels.to(torch.int64).contiguous()
    with exact_products(hidden.device.type):
        logps, lse, dx, stats_KT, mass_TC = module.forward(
            unit_stride(hidden),
            unit_stride(weight),
            labels,
            None if bias is None else bias.contiguous(),
            softcap,
            logit_scale,
            temperature,
            ignore_index,
            need_dx,
            token_names,
            filter_mass is not None,
        )
        plan = None
        if filter_mass is not None:
            rows = module.FILTER_ROWS
            plan = plan_filter(mass_TC, labels, ignore_index=ignore_index, filter_mass=filter_mass, rows=rows)
    stats_KT = _join_stats(names, token_names, stats_KT, plan, logps)
    dx = hidden.new_zeros(0, D) if dx is None else dx
    return logps, lse.double(), dx, stats_KT, *(no_tiles if plan is None else plan.kept)


def _no_tiles(labels: Tensor, num_classes: int, filter_mass: float | None) -> Tensor:
    return labels.new_zeros(0, 0 if filter_mass is None else num_tiles(num_classes), dtype=torch.bool)


def _join_stats(
    names: tuple[str, ...],
    token_names: tuple[str, ...],
    stats_KT: Tensor | None,
    plan: FilterPlan | None,
    logps_T: Tensor,
) -> Tensor:
    """Statistics of tokens and of the filter, in the order in which they were asked for."""
    if plan is not None and len(token_names) < len(names):
        found = filter_stats(plan, names, logps_T.dtype)
        if stats_KT is not None:
            found |= dict(zip(token_names, stats_KT.unbind(0), strict=True))
        return torch.stack([found[name] for name in names])
    return logps_T.new_zeros(0, len(logps_T)) if stats_KT is None else stats_KT


@linear_logps_op.register_fake
def _(
    hidden,
    weight,
    labels,
    bias,
    softcap,
    logit_scale,
    temperature,
    ignore_index,
    impl,
    need_dx,
    stats,
    weight_grad=None,
    filter_mass=None,
):
    (T, D), V = hidden.shape, weight.shape[0]
    logps = hidden.new_empty(T, dtype=accumulation_dtype(hidden.dtype))
    lse, dx = logps.new_empty(T, dtype=torch.float64), hidden.new_empty(T if need_dx else 0, D)
    order, kept = labels.new_empty(0, dtype=torch.int64), labels.new_empty(0, 0, dtype=torch.bool)
    if filter_mass is not None:
        rows = implementation("linear_logps", impl, hidden, filtered=True).FILTER_ROWS
        order, kept = order.new_empty(T), kept.new_empty(num_blocks(T, rows), num_tiles(V))
    return logps, lse, dx, logps.new_empty(len(split_stats(stats)), T), order, kept


def _run_backward(
    weight_grad,
    grad_logps,
    hidden,
    weight,
    labels,
    lse,
    bias,
    softcap,
    logit_scale,
    temperature,
    ignore_index,
    impl,
    need_hidden,
    need_weight,
    need_bias,
    order=None,
    kept=None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if hidden.shape[0] == 0:
        wanted = zip((hidden, weight, bias), (need_hidden, need_weight, need_bias), strict=True)
        dX, dW, db = (
            torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None for t, need in wanted
        )
        return dX, dW, db
    with exact_products(hidden.device.type):
        return implementation("linear_logps", impl, hidden, filtered=kept is not None).backward(
            grad_logps.contiguous(),
            unit_stride(hidden),
            unit_stride(weight),
            labels.to(torch.int64).contiguous(),
            lse,
            None if bias is None else bias.contiguous(),
            softcap,
            logit_scale,
            temperature,
            ignore_index,
            need_hidden,
            need_weight,
            need_bias,
            weight_grad,
            None if kept is None else Kept(order, kept),
        )


@torch.library.custom_op(
    "dpo_kernels::linear_logps_backward",
    mutates_args=(),
    schema=f"(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor labels, Tensor lse, Tensor? bias, {_OPTIONS},"
    " bool need_hidden, bool need_weight, bool need_bias, Tensor? order=None, Tensor? kept=None)"
    " -> (Tensor, Tensor, Tensor)",
)
def linear_logps_backward_op(grad_logps, hidden, *others) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db); what is not needed is an empty vector. order and kept are those of forward, None for all tiles."""
    dX, dW, db = (hidden.new_zeros(0) if t is None else t for t in _run_backward(None, grad_logps, hidden, *others))
    return dX, dW, db


@linear_logps_backward_op.register_fake
def _(grad_logps, hidden, weight, labels, lse, bias, *options):
    # After softcap, logit_scale, temperature, ignore_index and impl.
    needs = options[5:8]
    return empty_gradients((hidden, weight, bias), needs)


@torch.library.custom_op(
    "dpo_kernels::linear_logps_backward_accumulate",
    mutates_args=("weight_grad",),
    schema="(Tensor(a!) weight_grad, Tensor grad_logps, Tensor hidden, Tensor weight, Tensor labels, Tensor lse,"
    f" Tensor? bias, {_OPTIONS}, bool need_hidden, bool need_bias, Tensor? order=None, Tensor? kept=None)"
    " -> (Tensor, Tensor)",
)
def linear_logps_backward_accumulate_op(
    weight_grad, grad_logps, hidden, weight, labels, lse, bias, *options
) -> tuple[Tensor, Tensor]:
    """(dX, db), and dW is added to ``weight_grad``; what is not needed is an empty vector."""
    *numbers, need_hidden, need_bias = options[:7]
    options = (*numbers, need_hidden, True, need_bias, *options[7:])
    dX, _, db = _run_backward(weight_grad, grad_logps, hidden, weight, labels, lse, bias, *options)
    return hidden.new_zeros(0) if dX is None else dX, hidden.new_zeros(0) if db is None else db


@linear_logps_backward_accumulate_op.register_fake
def _(weight_grad, grad_logps, hidden, weight, labels, lse, bias, *options):
    # After softcap, logit_scale, temperature, ignore_index and impl.
    needs = options[5:7]
    return empty_gradients((hidden, bias), needs)


def _setup_context(ctx, inputs, output):
    hidden, weight, labels, bias, *ctx.options, need_dx, _, ctx.weight_grad, filter_mass = inputs
    _, lse, dx, stats, order, kept = output
    ctx.mark_non_differentiable(lse, dx, stats, order, kept)
    ctx.set_materialize_grads(False)
    ctx.frozen_head = need_dx
    if need_dx:
        ctx.save_for_backward(dx)
    else:
        tiles = (None, None) if filter_mass is None else (order, kept)
        ctx.save_for_backward(hidden, weight, labels, lse, bias, *tiles)


def _backward(ctx, grad_logps, *unused):
    refuse_double_backward("linear_logps")
    dX = dW = db = None
    if grad_logps is not None and ctx.frozen_head:
        (dx,) = ctx.saved_tensors
        dX = (dx * grad_logps.unsqueeze(1)).to(dx.dtype)
    elif grad_logps is not None:
        hidden, weight, labels, lse, bias, *tiles = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        saved = (grad_logps, hidden, weight, labels, lse, bias, *ctx.options)
        if need_weight and ctx.weight_grad is not None:
            dX, db = linear_logps_backward_accumulate_op(ctx.weight_grad, *saved, need_hidden, need_bias, *tiles)
            need_weight = False
        else:
            dX, dW, db = linear_logps_backward_op(*saved, need_hidden, need_weight, need_bias, *tiles)
        dX, dW, db = dX if need_hidden else None, dW if need_weight else None, db if need_bias else None
    return dX, dW, None, db, *(None,) * 9


linear_logps_op.register_autograd(_backward, setup_context=_setup_context)
