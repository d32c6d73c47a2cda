"""``torch.library`` registration of the paired loss: the pairs of a call, dispatch to an implementation, autograd.

Legend: T rows (tokens), D features, V vocabulary, K statistics, P pairs, S = 2 P responses: chosen_0, rejected_0, ...

The op returns the reduced loss *and* its gradients, formed in one pass over whole pairs: logits -> log-sum-exp ->
log-prob sums -> loss and its slopes -> gradients (3 products of the size of the logits product). That is right because
the reduced loss has one scalar upstream gradient. Losses that couple pairs, and reduction "none", do not come here.

A schema is flat; ``Inputs`` mirrors it and gives the records that implementations take. What these are is said in
``dpo_kernels.linear_dpo.interface``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype, early_gradient_dtype, exact_products, sum_responses, to_device
from dpo_kernels.dispatch import implementation
from dpo_kernels.head import Gradients, Needs
from dpo_kernels.linear_dpo.interface import PairLosses, PairScorer, Want
from dpo_kernels.linear_logps.ops import (
    OPTIONS_SCHEMA,
    check_labels,
    fake_gradients,
    input_gradients,
    needed_gradients,
    prepared_head,
    refuse_double_backward,
    split_stats,
    unit_stride,
    zero_gradients,
)
from dpo_kernels.losses import resolve_loss
from dpo_kernels.pairs import LossOptions

OFFSETS_WANTED = (
    "cumulative offsets that begin with 0 are wanted: for responses of 3, 2, 4 and 1 rows "
    "torch.tensor([0, 3, 5, 9, 10])"
)


def check_responses(cu_responses: Tensor, num_rows: int) -> list[int]:
    """The offsets as Python ints. Waits for the device when they are on one."""
    offsets = cu_responses.tolist()
    ordered = all(a <= b for a, b in itertools.pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != num_rows or not ordered:
        raise ValueError(
            f"cu_responses must rise from 0 to the number of rows, {num_rows}; got {offsets[:4]} ... {offsets[-2:]}; "
            f"{OFFSETS_WANTED}"
        )
    return offsets


@torch.library.custom_op("dpo_kernels::response_sums", mutates_args=(), schema="(Tensor values, Tensor cu) -> Tensor")
def response_sums(values: Tensor, cu: Tensor) -> Tensor:
    """Sums of the segments [cu[i], cu[i + 1]) of a vector, [S]; empty segments give 0."""
    check_responses(cu, values.shape[0])
    return sum_responses(values, _lengths(cu, values.device))


def _lengths(cu: Tensor, device: torch.device) -> Tensor:
    return to_device(cu.to(torch.int64).diff(), device)


@response_sums.register_fake
def _(values, cu):
    return values.new_empty(cu.shape[0] - 1)


def _setup_sums(ctx, inputs, output):
    values, cu = inputs
    ctx.num_rows = values.shape[0]
    ctx.save_for_backward(cu)


@torch.library.custom_op(
    "dpo_kernels::spread_over_responses",
    mutates_args=(),
    schema="(Tensor values, Tensor cu, SymInt num_rows) -> Tensor",
)
def _spread_over_responses(values, cu, num_rows) -> Tensor:
    """The value of its response for every row."""
    return values.repeat_interleave(_lengths(cu, values.device), output_size=num_rows)


@_spread_over_responses.register_fake
def _(values, cu, num_rows):
    return values.new_empty(num_rows)


def _backward_of_sums(ctx, grad):
    (cu,) = ctx.saved_tensors
    return _spread_over_responses(grad, cu, ctx.num_rows), None


response_sums.register_autograd(_backward_of_sums, setup_context=_setup_sums)


def reduce_losses(losses_P: Tensor, pair_weights_P: Tensor | None, mean: bool) -> Tensor:
    """Weighted sum, divided by the number of pairs for the mean; 0 when there are none."""
    total = losses_P.sum() if pair_weights_P is None else (losses_P * pair_weights_P).sum()
    return total / max(1, losses_P.shape[0]) if mean else total


class Inputs(NamedTuple):
    """Arguments of ``dpo_kernels::linear_dpo``."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    cu_responses: Tensor
    ref_logps: Tensor | None
    lengths: Tensor | None
    mean_length: Tensor | None
    pair_weights: Tensor | None
    bias: Tensor | None
    loss_type: str
    """Names, joined by commas."""
    loss_weights: list[float]
    loss_options: list[float]
    mean: bool
    softcap: float | None
    logit_scale: float
    temperature: float
    ignore_index: int
    impl: str
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    weight_grad: Tensor | None = None
    """For backward, which adds dW to it."""
    stats: str = ""
    """Names, joined by commas."""
    margins: Tensor | None = None
    token_weights: Tensor | None = None

    @property
    def needs(self) -> Needs:
        return Needs(self.need_hidden, self.need_weight, self.need_bias)


class Outputs(NamedTuple):
    """Results of ``dpo_kernels::linear_dpo``. Gradients are those for an upstream gradient of 1."""

    loss: Tensor
    losses: Tensor
    logps: Tensor
    dX: Tensor
    """This and the other gradients are empty vectors where they are not needed."""
    dW: Tensor
    db: Tensor
    stats: Tensor
    """[K, T] for the K names in ``stats``."""


@torch.library.custom_op(
    "dpo_kernels::linear_dpo",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, Tensor cu_responses, Tensor? ref_logps, Tensor? lengths,"
    " Tensor? mean_length, Tensor? pair_weights, Tensor? bias, str loss_type, float[] loss_weights,"
    f" float[] loss_options, bool mean, {OPTIONS_SCHEMA}, bool need_hidden, bool need_weight, bool need_bias,"
    ' Tensor? weight_grad=None, str stats="", Tensor? margins=None, Tensor? token_weights=None)'
    " -> (Tensor loss, Tensor losses, Tensor logps, Tensor dX, Tensor dW, Tensor db, Tensor stats)",
)
def linear_dpo_op(*arguments) -> Outputs:
    given = Inputs(*arguments)
    hidden, names = given.hidden, split_stats(given.stats)
    loss_types = given.loss_type.split(",")
    module = implementation("linear_dpo", given.impl, hidden, names, losses=loss_types)
    check_labels(given.labels, given.weight.shape[0], given.ignore_index)
    scorer = _make_scorer(given)
    with exact_products(hidden.device.type):
        if hidden.shape[0] == 0:
            logps_S = hidden.new_zeros(len(scorer.offsets) - 1, dtype=accumulation_dtype(hidden.dtype))
            losses_P, _ = scorer.score(logps_S)
            found = PairLosses(losses_P, logps_S, zero_gradients(given, given.needs))
        else:
            found = module.forward(
                unit_stride(hidden),
                prepared_head(given),
                given.labels.to(torch.int64).contiguous(),
                scorer,
                ignore_index=given.ignore_index,
                want=Want(given.needs, names),
            )
    loss = reduce_losses(found.losses_P, given.pair_weights, given.mean)
    dtype = early_gradient_dtype(hidden.dtype)
    dX, dW, db = (hidden.new_zeros(0, dtype=dtype) if g is None else g.to(dtype) for g in found.gradients)
    stats = found.logps_S.new_zeros(len(names), hidden.shape[0]) if found.stats_KT is None else found.stats_KT
    return Outputs(loss, found.losses_P, found.logps_S, dX, dW, db, stats)


def _make_scorer(given: Inputs) -> PairScorer:
    hidden = given.hidden
    offsets = check_responses(given.cu_responses, hidden.shape[0])
    num_pairs = len(offsets) // 2
    weights_P = given.pair_weights
    if weights_P is None:
        weights_P = hidden.new_ones(num_pairs, dtype=accumulation_dtype(hidden.dtype))
    return PairScorer(
        mix=resolve_loss(given.loss_type.split(","), given.loss_weights),
        options=LossOptions(*given.loss_options),
        offsets=offsets,
        cu_S1=to_device(given.cu_responses.to(torch.int64), hidden.device),
        ref_logps_S=given.ref_logps,
        lengths_S=given.lengths,
        mean_length=given.mean_length,
        scale_P=weights_P / max(1, num_pairs) if given.mean else weights_P,
        margins_P=given.margins,
        token_weights_T=None if given.token_weights is None else given.token_weights.contiguous(),
    )


@linear_dpo_op.register_fake
def _(*arguments):
    given = Inputs(*arguments)
    hidden, num_responses = given.hidden, given.cu_responses.shape[0] - 1
    logps = hidden.new_empty(num_responses, dtype=accumulation_dtype(hidden.dtype))
    gradients = fake_gradients(given, given.needs, early_gradient_dtype(hidden.dtype))
    stats = logps.new_empty(len(split_stats(given.stats)), hidden.shape[0])
    return Outputs(logps.new_empty(()), logps.new_empty(num_responses // 2), logps, *gradients, stats)


def _setup_context(ctx, inputs, output):
    given, found = Inputs(*inputs), Outputs(*output)
    ctx.mark_non_differentiable(*found[1:])
    ctx.set_materialize_grads(False)
    ctx.gradients = Gradients(found.dX, found.dW, found.db)
    ctx.dtype = given.hidden.dtype
    ctx.weight_grad = given.weight_grad
    ctx.impl, ctx.losses = given.impl, given.loss_type.split(",")


def _backward(ctx, grad_loss, *unused):
    refuse_double_backward("linear_dpo_loss")
    if ctx.gradients is None:
        raise RuntimeError("second backward through linear_dpo_loss: pass retain_graph=True to the first")
    needs, early = needed_gradients(Inputs, ctx), ctx.gradients
    # dW is as large as the weight. When the graph is dropped anyway it is scaled where it lies and handed over.
    hand_over = type(grad_loss) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    if hand_over:
        ctx.gradients = None
    if grad_loss is None:
        return input_gradients(Inputs, needs)
    if ctx.weight_grad is not None:
        ctx.weight_grad.addcmul_(early.dW_VD, grad_loss)
        needs = needs._replace(weight=False)

    scale: Callable[[Tensor, Tensor], Tensor] = torch.mul
    if hand_over:
        scale = getattr(implementation("linear_dpo", ctx.impl, grad_loss, losses=ctx.losses), "scale_", Tensor.mul_)

    def scaled(gradient: Tensor, need: bool) -> Tensor | None:
        return scale(gradient, grad_loss).to(ctx.dtype) if need else None

    return input_gradients(Inputs, needs, *map(scaled, early, (needs.hidden, needs.weight, needs.bias)))


linear_dpo_op.register_autograd(_backward, setup_context=_setup_context)
