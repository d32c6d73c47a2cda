"""``torch.library`` registration of the paired loss: scoring from the loss table, dispatch, autograd.

Legend: T rows (tokens), D features, V vocabulary, P pairs, S = 2 P responses: chosen_0, rejected_0, chosen_1, ...

The op returns the reduced loss *and* its gradients, formed in one pass over whole pairs: logits -> log-sum-exp ->
log-prob sums -> loss and its slopes -> gradients (3 products of the size of the logits product). That is right because
the reduced loss has one scalar upstream gradient. Losses that couple pairs, and reduction "none", do not come here.

An implementation is a module beside this one. Conventions for tensors are those of ``dpo_kernels.linear_logps.ops``
(below autograd, autocast off, T > 0, unit stride along D, valid int64 labels, no mutation, no synchronisation of a CUDA
device, same bits when run twice).

``why_not(device, dtype) -> str | None``
    (Triton only.) As in ``dpo_kernels.linear_logps.ops``.
``LOSSES``
    (Triton only.) Names of the losses that it computes; ``torch`` and ``reference`` compute the whole table.
``STATS``
    (Triton only.) As in ``dpo_kernels.linear_logps.ops``.
``forward(hidden_TD, weight_VD, labels_T, cu_responses, score_pairs, bias_V, softcap, logit_scale, temperature,
ignore_index, need_hidden, need_weight, need_bias, stats) -> (losses_P, logps_S, dX_TD | None, dW_VD | None,
db_V | None, stats_KT | None)``
    ``cu_responses`` is a list of S + 1 Python ints, S > 0: offsets of the responses in the rows, from 0 to T, not
    decreasing; responses may be empty. ``score_pairs(logps, first_pair) -> (losses, slopes)`` defines the loss: it
    takes the log-prob sums of consecutive whole pairs from ``first_pair`` on, [2 p] float32 (float64), on the device of
    hidden, contiguous, and returns the losses of the pairs, [p], and d (reduced loss) / d logps, [2 p], in which pair
    weights and the divisor of the mean are included. It launches a few tiny torch kernels and never synchronises. An
    implementation that scores pairs in a kernel finds the terms in its attributes ``mix, options, ref_logps_S,
    lengths_S, mean_length, scale_P``; ``cu_S1`` is ``cu_responses`` on the device of hidden, int64. A row's gradient is
    then slope[response of the row] * d logps_t. Every pair must be scored exactly once. Ignored rows add 0 to their
    response and get gradient exactly 0. Gradients have the dtypes of hidden, weight and bias, but float32 for float16
    (``early_gradient_dtype``); each is a tensor that nothing else refers to. ``stats`` and stats_KT are as in
    ``dpo_kernels.linear_logps.ops``.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype, early_gradient_dtype, exact_products, sum_responses, to_device
from dpo_kernels.dispatch import implementation
from dpo_kernels.linear_logps.ops import (
    check_labels,
    empty_gradients,
    refuse_double_backward,
    split_stats,
    unit_stride,
)
from dpo_kernels.losses import LossMix, LossOptions, Pairs, resolve_loss


def check_responses(cu_responses: Tensor, num_rows: int) -> list[int]:
    """The offsets as Python ints. Waits for the device when they are on one."""
    offsets = cu_responses.tolist()
    ordered = all(a <= b for a, b in itertools.pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != num_rows or not ordered:
        raise ValueError(
            f"cu_responses must rise from 0 to the number of rows, {num_rows}; got {offsets[:4]} ... {offsets[-2:]}"
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


def make_pairs(
    logps_S: Tensor, ref_logps_S: Tensor | None, lengths_S: Tensor | None, mean_length, options: LossOptions
) -> Pairs:
    """The loss table's view of interleaved responses."""

    def side(values: Tensor | None, start: int) -> Tensor | None:
        return None if values is None else values[start::2]

    return Pairs(
        logps_S[0::2],
        logps_S[1::2],
        side(ref_logps_S, 0),
        side(ref_logps_S, 1),
        side(lengths_S, 0),
        side(lengths_S, 1),
        mean_length,
        options,
    )


def reduce_losses(losses_P: Tensor, pair_weights_P: Tensor | None, mean: bool) -> Tensor:
    """Weighted sum, divided by the number of pairs for the mean; 0 when there are none."""
    total = losses_P.sum() if pair_weights_P is None else (losses_P * pair_weights_P).sum()
    return total / max(1, losses_P.shape[0]) if mean else total


class _Scorer:
    """Losses of consecutive pairs and the slopes of the reduced loss, by autograd on tensors of few numbers."""

    def __init__(
        self,
        mix: LossMix,
        options: LossOptions,
        ref_logps_S: Tensor | None,
        lengths_S: Tensor | None,
        mean_length: Tensor | float | None,
        scale_P: Tensor,
        cu_S1: Tensor,
    ):
        self.mix = mix
        self.options = options
        self.ref_logps_S = ref_logps_S
        self.lengths_S = lengths_S
        self.mean_length = mean_length
        self.scale_P = scale_P
        self.cu_S1 = cu_S1

    def __call__(self, logps_S: Tensor, first_pair: int) -> tuple[Tensor, Tensor]:
        responses = slice(2 * first_pair, 2 * first_pair + logps_S.shape[0])

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[responses].clone()

        # Leaving inference mode is what switches autograd back on inside an operator.
        with torch.inference_mode(False):
            leaf_S = logps_S.detach().clone().requires_grad_()
            pairs = make_pairs(leaf_S, part(self.ref_logps_S), part(self.lengths_S), self.mean_length, self.options)
            losses_P = self.mix.losses(pairs)
            scale_P = self.scale_P[responses.start // 2 : responses.stop // 2].clone()
            (slopes_S,) = torch.autograd.grad((losses_P * scale_P).sum(), leaf_S)
        return losses_P.detach(), slopes_S


_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor cu_responses, Tensor? ref_logps, Tensor? lengths,"
    " Tensor? mean_length, Tensor? pair_weights, Tensor? bias, str loss_type, float[] loss_weights,"
    " float[] loss_options, bool mean, float? softcap, float logit_scale, float temperature, int ignore_index,"
    " str impl, bool need_hidden, bool need_weight, bool need_bias, Tensor? weight_grad=None,"
    ' str stats="") -> (Tensor loss, Tensor losses, Tensor logps, Tensor dX, Tensor dW, Tensor db, Tensor stats)'
)


@torch.library.custom_op("dpo_kernels::linear_dpo", mutates_args=(), schema=_SCHEMA)
def linear_dpo_op(
    hidden,
    weight,
    labels,
    cu_responses,
    ref_logps,
    lengths,
    mean_length,
    pair_weights,
    bias,
    loss_type,
    loss_weights,
    loss_options,
    mean,
    softcap,
    logit_scale,
    temperature,
    ignore_index,
    impl,
    need_hidden,
    need_weight,
    need_bias,
    weight_grad=None,
    stats="",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients are those for an upstream gradient of 1; what is not needed is an empty vector.

    ``weight_grad`` is for backward, which adds dW to it. The last result is [K, T] for the K names in ``stats``, joined
    by commas.
    """
    mix, names = resolve_loss(loss_type.split(","), loss_weights), split_stats(stats)
    module = implementation("linear_dpo", impl, hidden, names, losses=[loss.name for loss in mix.types])
    check_labels(labels, weight.shape[0], ignore_index)
    offsets = check_responses(cu_responses, hidden.shape[0])
    num_pairs = len(offsets) // 2
    dtype = accumulation_dtype(hidden.dtype)
    weights_P = hidden.new_ones(num_pairs, dtype=dtype) if pair_weights is None else pair_weights
    score_pairs = _Scorer(
        mix,
        LossOptions(*loss_options),
        ref_logps,
        lengths,
        mean_length,
        weights_P / max(1, num_pairs) if mean else weights_P,
        to_device(cu_responses.to(torch.int64), hidden.device),
    )
    with exact_products(hidden.device.type):
        if hidden.shape[0] == 0:
            logps = hidden.new_zeros(2 * num_pairs, dtype=dtype)
            losses, _ = score_pairs(logps, 0)
            wanted = zip((hidden, weight, bias), (need_hidden, need_weight, need_bias), strict=True)
            gradients = [t.new_zeros(t.shape) if need else None for t, need in wanted]
            stats_KT = None
        else:
            losses, logps, *gradients, stats_KT = module.forward(
                unit_stride(hidden),
                unit_stride(weight),
                labels.to(torch.int64).contiguous(),
                offsets,
                score_pairs,
                None if bias is None else bias.contiguous(),
                softcap,
                logit_scale,
                temperature,
                ignore_index,
                need_hidden,
                need_weight,
                need_bias,
                names,
            )
    loss = reduce_losses(losses, weights_P, mean)
    kept = early_gradient_dtype(hidden.dtype)
    dX, dW, db = (hidden.new_zeros(0, dtype=kept) if g is None else g.to(kept) for g in gradients)
    stats_KT = logps.new_zeros(len(names), hidden.shape[0]) if stats_KT is None else stats_KT
    return loss, losses, logps, dX, dW, db, stats_KT


@linear_dpo_op.register_fake
def _(hidden, weight, labels, cu_responses, ref_logps, lengths, mean_length, pair_weights, bias, *options):
    num_responses = cu_responses.shape[0] - 1
    logps = hidden.new_empty(num_responses, dtype=accumulation_dtype(hidden.dtype))
    # After loss_type, loss_weights, loss_options, mean, softcap, logit_scale, temperature, ignore_index and impl.
    needs = options[9:12]
    gradients = empty_gradients((hidden, weight, bias), needs, early_gradient_dtype(hidden.dtype))
    # Last, after the needs and weight_grad; left out where it has its default.
    names = split_stats(options[13]) if len(options) > 13 else ()
    stats = logps.new_empty(len(names), hidden.shape[0])
    return logps.new_empty(()), logps.new_empty(num_responses // 2), logps, *gradients, stats


def _setup_context(ctx, inputs, output):
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.gradients = tuple(others[2:5])
    ctx.dtype = inputs[0].dtype
    ctx.weight_grad = inputs[-2]


def _backward(ctx, grad_loss, *unused):
    refuse_double_backward("linear_dpo_loss")
    if ctx.gradients is None:
        raise RuntimeError("second backward through linear_dpo_loss: pass retain_graph=True to the first")
    gradients = ctx.gradients
    # dW is as large as the weight. When the graph is dropped anyway it is scaled where it lies and handed over.
    hand_over = type(grad_loss) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    if hand_over:
        ctx.gradients = None
    result = [None] * 23
    if grad_loss is not None:
        for position, gradient in zip((0, 1, 8), gradients, strict=True):
            if position == 1 and ctx.weight_grad is not None:
                ctx.weight_grad.addcmul_(gradient, grad_loss)
            elif ctx.needs_input_grad[position]:
                scaled = gradient.mul_(grad_loss) if hand_over else gradient * grad_loss
                result[position] = scaled.to(ctx.dtype)
    return tuple(result)


linear_dpo_op.register_autograd(_backward, setup_context=_setup_context)
