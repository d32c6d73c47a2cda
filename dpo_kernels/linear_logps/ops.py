"""``torch.library`` registration of ``linear_logps``: validity of labels, dispatch to an implementation, autograd.

Legend: T rows (tokens), D features, V vocabulary, K statistics.

A schema is flat; ``Inputs`` and its like mirror it and give the records that implementations take. What these are is
said in ``dpo_kernels.linear_logps.interface``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype, exact_products
from dpo_kernels.dispatch import implementation
from dpo_kernels.head import Gradients, Head, Needs
from dpo_kernels.linear_logps.interface import Want
from dpo_kernels.linear_logps.tile_filter import (
    FILTER_STATS,
    FilterPlan,
    Kept,
    filter_stats,
    num_blocks,
    num_tiles,
    plan_filter,
)

OPTIONS = ("softcap", "logit_scale", "temperature", "ignore_index", "impl")
OPTIONS_SCHEMA = "float? softcap, float logit_scale, float temperature, int ignore_index, str impl"


class Inputs(NamedTuple):
    """Arguments of ``dpo_kernels::linear_logps``."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    ignore_index: int
    impl: str
    need_dx: bool
    stats: str
    """Names, joined by commas."""
    weight_grad: Tensor | None = None
    """For backward, which adds dW to it."""
    filter_mass: float | None = None


class Outputs(NamedTuple):
    """Results of ``dpo_kernels::linear_logps``."""

    logps: Tensor
    lse: Tensor
    dx: Tensor
    """Empty, [0, D], unless ``need_dx``."""
    stats: Tensor
    """[K, T] for the K names in ``stats``."""
    order: Tensor
    """With ``kept`` the parts of a ``tile_filter.Kept``, empty without ``filter_mass``."""
    kept: Tensor


class BackwardInputs(NamedTuple):
    """Arguments of ``dpo_kernels::linear_logps_backward``."""

    grad_logps: Tensor
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    lse: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    ignore_index: int
    impl: str
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    order: Tensor | None = None
    """With ``kept`` those of forward, None for all tiles."""
    kept: Tensor | None = None


class AccumulateInputs(NamedTuple):
    """Arguments of ``dpo_kernels::linear_logps_backward_accumulate``."""

    weight_grad: Tensor
    grad_logps: Tensor
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    lse: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    ignore_index: int
    impl: str
    need_hidden: bool
    need_bias: bool
    order: Tensor | None = None
    kept: Tensor | None = None


def head_fields(head: Head) -> dict[str, Any]:
    """A head under the names that schemas have for its parts."""
    return {"weight": head.weight_VD, **head.options}


def prepared_head(given: Any) -> Head:
    """The head among the arguments of an op, as implementations take it."""
    bias = None if given.bias is None else given.bias.contiguous()
    return Head(unit_stride(given.weight), bias, given.softcap, given.logit_scale, given.temperature)


def unit_stride(matrix: Tensor) -> Tensor:
    """The same matrix with unit stride along its last dimension; a copy only when it has to be."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


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


def fake_gradients(given: Any, needs: Needs, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What a fake backward returns: a tensor like each input, and an empty vector for what is not needed."""
    wanted = ((given.hidden, needs.hidden), (given.weight, needs.weight), (given.bias, needs.bias))
    dX, dW, db = (
        t.new_empty(t.shape, dtype=dtype) if need else given.hidden.new_empty(0, dtype=dtype) for t, need in wanted
    )
    return dX, dW, db


def zero_gradients(given: Any, needs: Needs) -> Gradients:
    """Gradients where there are no rows."""
    wanted = ((given.hidden, needs.hidden), (given.weight, needs.weight), (given.bias, needs.bias))
    return Gradients(
        *(torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None for t, need in wanted)
    )


def needed_gradients(kind: Any, ctx: Any) -> Needs:
    """What autograd asks a backward for, of an op with the arguments that ``kind`` names."""
    # Arguments that have their defaults may be left out at the end.
    asked = dict(zip(kind._fields, ctx.needs_input_grad, strict=False))
    return Needs(asked["hidden"], asked["weight"], asked["bias"])


def input_gradients(
    kind: Any, needs: Needs, dX: Tensor | None = None, dW: Tensor | None = None, db: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """What a backward returns to autograd: one gradient an argument of the op, None for all that needs none."""
    found = {
        "hidden": dX if needs.hidden else None,
        "weight": dW if needs.weight else None,
        "bias": db if needs.bias else None,
    }
    return tuple(found.get(name) for name in kind._fields)


def refuse_double_backward(name: str) -> None:
    """The gradient formulas below are not differentiable themselves; a graph through them would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: call backward() or autograd.grad() without create_graph=True"
        )


@torch.library.custom_op(
    "dpo_kernels::linear_logps",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {OPTIONS_SCHEMA}, bool need_dx, str stats,"
    " Tensor? weight_grad=None, float? filter_mass=None)"
    " -> (Tensor logps, Tensor lse, Tensor dx, Tensor stats, Tensor order, Tensor kept)",
)
def linear_logps_op(*arguments) -> Outputs:
    given = Inputs(*arguments)
    hidden, filtered = given.hidden, given.filter_mass is not None
    names = split_stats(given.stats)
    token_names = tuple(name for name in names if name not in FILTER_STATS)
    module = implementation("linear_logps", given.impl, hidden, token_names, filtered)
    (T, D), V = hidden.shape, given.weight.shape[0]
    check_labels(given.labels, V, given.ignore_index)
    no_dx = hidden.new_zeros(0, D)
    if T == 0:
        logps = hidden.new_zeros(0, dtype=accumulation_dtype(hidden.dtype))
        lse, stats = logps.new_zeros(0, dtype=torch.float64), logps.new_zeros(len(names), 0)
        return Outputs(logps, lse, no_dx, stats, *_no_tiles(given))
    labels = given.labels.to(torch.int64).contiguous()
    plan = None
    with exact_products(hidden.device.type):
        found = module.forward(
            unit_stride(hidden),
            prepared_head(given),
            labels,
            ignore_index=given.ignore_index,
            want=Want(given.need_dx, token_names, filtered),
        )
        if given.filter_mass is not None:
            plan = plan_filter(
                found.mass_TC,
                labels,
                ignore_index=given.ignore_index,
                filter_mass=given.filter_mass,
                rows=module.FILTER_ROWS,
            )
    stats = _join_stats(names, token_names, found.stats_KT, plan, found.logps_T)
    dx = no_dx if found.dx_TD is None else found.dx_TD
    return Outputs(found.logps_T, found.lse_T.double(), dx, stats, *(_no_tiles(given) if plan is None else plan.kept))


def _no_tiles(given: Inputs) -> Kept:
    """What is kept where there are no rows, or no filter."""
    columns = 0 if given.filter_mass is None else num_tiles(given.weight.shape[0])
    labels = given.labels
    return Kept(labels.new_zeros(0, dtype=torch.int64), labels.new_zeros(0, columns, dtype=torch.bool))


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
def _(*arguments):
    given = Inputs(*arguments)
    hidden, labels = given.hidden, given.labels
    (T, D), V = hidden.shape, given.weight.shape[0]
    logps = hidden.new_empty(T, dtype=accumulation_dtype(hidden.dtype))
    lse, dx = logps.new_empty(T, dtype=torch.float64), hidden.new_empty(T if given.need_dx else 0, D)
    order, kept = labels.new_empty(0, dtype=torch.int64), labels.new_empty(0, 0, dtype=torch.bool)
    if given.filter_mass is not None:
        rows = implementation("linear_logps", given.impl, hidden, filtered=True).FILTER_ROWS
        order, kept = order.new_empty(T), kept.new_empty(num_blocks(T, rows), num_tiles(V))
    return Outputs(logps, lse, dx, logps.new_empty(len(split_stats(given.stats)), T), order, kept)


def _run_backward(given: BackwardInputs, weight_grad: Tensor | None = None) -> Gradients:
    hidden, filtered = given.hidden, given.kept is not None
    tiles = Kept(given.order, given.kept) if filtered else None  # type: ignore[arg-type]
    needs = Needs(given.need_hidden, given.need_weight, given.need_bias, weight_grad, tiles)
    if hidden.shape[0] == 0:
        return zero_gradients(given, needs)
    with exact_products(hidden.device.type):
        return implementation("linear_logps", given.impl, hidden, filtered=filtered).backward(
            given.grad_logps.contiguous(),
            unit_stride(hidden),
            prepared_head(given),
            given.labels.to(torch.int64).contiguous(),
            given.lse,
            ignore_index=given.ignore_index,
            needs=needs,
        )


@torch.library.custom_op(
    "dpo_kernels::linear_logps_backward",
    mutates_args=(),
    schema="(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor labels, Tensor lse, Tensor? bias,"
    f" {OPTIONS_SCHEMA}, bool need_hidden, bool need_weight, bool need_bias, Tensor? order=None, Tensor? kept=None)"
    " -> (Tensor, Tensor, Tensor)",
)
def linear_logps_backward_op(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db); what is not needed is an empty vector."""
    given = BackwardInputs(*arguments)
    dX, dW, db = (given.hidden.new_zeros(0) if t is None else t for t in _run_backward(given))
    return dX, dW, db


@linear_logps_backward_op.register_fake
def _(*arguments):
    given = BackwardInputs(*arguments)
    return fake_gradients(given, Needs(given.need_hidden, given.need_weight, given.need_bias))


@torch.library.custom_op(
    "dpo_kernels::linear_logps_backward_accumulate",
    mutates_args=("weight_grad",),
    schema="(Tensor(a!) weight_grad, Tensor grad_logps, Tensor hidden, Tensor weight, Tensor labels, Tensor lse,"
    f" Tensor? bias, {OPTIONS_SCHEMA}, bool need_hidden, bool need_bias, Tensor? order=None, Tensor? kept=None)"
    " -> (Tensor, Tensor)",
)
def linear_logps_backward_accumulate_op(*arguments) -> tuple[Tensor, Tensor]:
    """(dX, db), and dW is added to ``weight_grad``; what is not needed is an empty vector."""
    shared = AccumulateInputs(*arguments)._asdict()
    weight_grad = shared.pop("weight_grad")
    given = BackwardInputs(**shared, need_weight=True)
    dX, _, db = _run_backward(given, weight_grad)
    return given.hidden.new_zeros(0) if dX is None else dX, given.hidden.new_zeros(0) if db is None else db


@linear_logps_backward_accumulate_op.register_fake
def _(*arguments):
    given = AccumulateInputs(*arguments)
    dX, _, db = fake_gradients(given, Needs(given.need_hidden, False, given.need_bias))
    return dX, db


SAVED = ("hidden", "weight", "labels", "lse", "bias", "order", "kept")
"""What backward takes of forward, by its names."""


def _setup_context(ctx, inputs, output):
    given, found = Inputs(*inputs), Outputs(*output)
    ctx.mark_non_differentiable(*found[1:])
    ctx.set_materialize_grads(False)
    ctx.frozen_head = given.need_dx
    ctx.weight_grad = given.weight_grad
    if given.need_dx:
        ctx.save_for_backward(found.dx)
        return
    ctx.options = {name: getattr(given, name) for name in OPTIONS}
    tiles = (None, None) if given.filter_mass is None else (found.order, found.kept)
    ctx.save_for_backward(given.hidden, given.weight, given.labels, found.lse, given.bias, *tiles)


def _backward(ctx, grad_logps, *unused):
    refuse_double_backward("linear_logps")
    needs = needed_gradients(Inputs, ctx)
    if grad_logps is None:
        return input_gradients(Inputs, needs)
    if ctx.frozen_head:
        (dx,) = ctx.saved_tensors
        return input_gradients(Inputs, needs, (dx * grad_logps.unsqueeze(1)).to(dx.dtype))
    given = {"grad_logps": grad_logps, **dict(zip(SAVED, ctx.saved_tensors, strict=True)), **ctx.options}
    given |= {"need_hidden": needs.hidden, "need_bias": needs.bias}
    if needs.weight and ctx.weight_grad is not None:
        dX, db = linear_logps_backward_accumulate_op(*AccumulateInputs(weight_grad=ctx.weight_grad, **given))
        return input_gradients(Inputs, needs, dX, None, db)
    found = linear_logps_backward_op(*BackwardInputs(need_weight=needs.weight, **given))
    return input_gradients(Inputs, needs, *found)


linear_logps_op.register_autograd(_backward, setup_context=_setup_context)
