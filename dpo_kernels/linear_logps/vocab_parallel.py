"""``linear_logps`` where each process holds a slice of the vocabulary.

Legend: T rows (tokens), D features, V vocabulary of all processes, v columns of this process.

Each process runs the implementation of ``linear_logps`` on its slice. Three numbers a row then make the whole: the
maximum of the slices' log-sum-exps, the sum of their exponentials relative to it, and the label's logit, which one
process has. Backward needs nothing but the whole log-sum-exp: a slice of the softmax is e^(z - lse).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.chunks import accumulation_dtype
from dpo_kernels.dispatch import check_impl
from dpo_kernels.head import Head, Needs
from dpo_kernels.linear_logps import ops
from dpo_kernels.linear_logps.ops import (
    OPTIONS,
    OPTIONS_SCHEMA,
    fake_gradients,
    head_fields,
    input_gradients,
    linear_logps_backward_op,
    linear_logps_op,
    needed_gradients,
    refuse_double_backward,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_IGNORED = -100
_ELSEWHERE = -1
"""Label of a row whose label is a column of another process."""


def linear_logps_vocab_parallel(
    hidden_TD: Tensor,
    weight_shard_vD: Tensor,
    labels_T: Tensor,
    *,
    group: ProcessGroup,
    vocab_start: int,
    bias_shard: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor:
    """``linear_logps`` under a head whose rows are spread over the processes of a group, as in Megatron.

    Every process calls it with the same hidden states, labels and options, and with its own slice of the head. Slices
    are disjoint, together the vocabulary, and may differ in size. Every process gets the same log-probs. The loss after
    it must be the same on every process, too: in backward, the gradient of the slice stays where the slice is, and the
    gradient of the hidden states is summed over the processes, so that each has the whole of it.

    Work per process is that of ``linear_logps`` with v columns (1 product of 2 T D v operations forward, 3 backward, 2
    with a frozen slice). Traffic: 4 T numbers of float64 in two reductions forward, T D of float32 (float64 for float64
    inputs) in one backward, none where hidden needs no gradient.

    Args:
        hidden_TD: [T, D], as in ``linear_logps``.
        weight_shard_vD: [v, D], v >= 1; rows vocab_start to vocab_start + v of the head.
        labels_T: [T], int64 or int32, in [0, V) or ``ignore_index``: labels of the whole vocabulary.
        group: the processes that share the head; ``torch.distributed.group.WORLD`` for all.
        vocab_start: the class of the first row of this process's slice.
        bias_shard: [v] or None on every process.
        softcap, logit_scale, temperature, ignore_index: as in ``linear_logps``.
        impl: as in ``linear_logps``, but for "reference", which has no slices.

    Returns:
        [T], float32 (float64 for float64 inputs), in nats; exactly 0 where ignored.

    Raises:
        ValueError: as ``linear_logps``; on the CPU also a label that not exactly one process has, on every process (on
            a GPU that is a device-side assertion). Errors in shapes or numbers must be the same on every process:
            otherwise those without one wait for the others.
        RuntimeError: an ``impl`` that cannot run here.
    """
    check_impl(impl)
    if impl == "reference":
        raise RuntimeError("linear_logps_vocab_parallel has no impl='reference': that one needs the whole vocabulary")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be at least 0; got {vocab_start}")
    hidden_TD, head = Head(weight_shard_vD, bias_shard, softcap, logit_scale, temperature).autocast(hidden_TD)
    head.check(hidden_TD, labels_T)
    inputs = Inputs(
        hidden=hidden_TD,
        labels=labels_T,
        **head_fields(head),
        ignore_index=ignore_index,
        impl=impl,
        vocab_start=vocab_start,
        group=group.group_name,
    )
    return vocab_parallel_op(*inputs)[0]


def _all_reduce_(tensor: Tensor, group: Any, operation: str = "SUM") -> Tensor:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group

    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), _resolve_process_group(group))
    return tensor


def _local_labels(labels: Tensor, ignore_index: int, vocab_start: int, width: int) -> Tensor:
    """Column of the label in this slice, _IGNORED or _ELSEWHERE."""
    labels = labels.to(torch.int64)
    local = labels - vocab_start
    local = local.masked_fill((local < 0) | (local >= width), _ELSEWHERE)
    return local.masked_fill(labels == ignore_index, _IGNORED)


def _check_owners(labels: Tensor, owners: Tensor, ignore_index: int) -> None:
    """Raise where a label that counts is not a column of exactly one process; on a GPU without waiting for it."""
    bad_T = (owners != 1) & (labels != ignore_index)
    if labels.device.type == "cuda":
        torch._assert_async(~bad_T.any(), "a label is not a class of exactly one process and is not ignore_index")
    elif bool(bad_T.any()):
        row = int(bad_T.nonzero()[0])
        raise ValueError(
            f"labels must be a class that exactly one process holds, or {ignore_index} (ignored); got"
            f" {int(labels[row])} at index {row}, held by {int(owners[row])} processes"
        )


class Inputs(NamedTuple):
    """Arguments of ``dpo_kernels::linear_logps_vocab_parallel``."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    ignore_index: int
    impl: str
    vocab_start: int
    group: str


class BackwardInputs(NamedTuple):
    """Arguments of ``dpo_kernels::linear_logps_vocab_parallel_backward``."""

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
    vocab_start: int
    group: str
    need_hidden: bool
    need_weight: bool
    need_bias: bool


def _for_one_process(given: Inputs | BackwardInputs, kind: type, labels: Tensor, **others: Any) -> Any:
    """The arguments of an op of ``linear_logps``, which are of this slice of the vocabulary alone."""
    shared = {name: value for name, value in given._asdict().items() if name in kind._fields}  # type: ignore[attr-defined]
    return kind(**{**shared, "labels": labels, "ignore_index": _IGNORED, **others})


@torch.library.custom_op(
    "dpo_kernels::linear_logps_vocab_parallel",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {OPTIONS_SCHEMA}, int vocab_start, str group)"
    " -> (Tensor logps, Tensor lse)",
)
def vocab_parallel_op(*arguments) -> tuple[Tensor, Tensor]:
    given = Inputs(*arguments)
    local = _local_labels(given.labels, given.ignore_index, given.vocab_start, given.weight.shape[0])
    # Rows whose label is elsewhere are still needed for their log-sum-exp: any column serves as their label.
    labels = local.masked_fill(local == _ELSEWHERE, 0)
    slice_logps, slice_lse, *_ = linear_logps_op(*_for_one_process(given, ops.Inputs, labels, need_dx=False, stats=""))
    if given.hidden.shape[0] == 0:
        return slice_logps, slice_lse
    largest = _all_reduce_(slice_lse.clone(), given.group, "MAX")
    gap = slice_lse - largest
    # A slice that a bias masks whole has no softmax of its own.
    label_logit = torch.where(gap.isneginf(), gap, slice_logps + gap)
    inside = local >= 0
    sums = _all_reduce_(torch.stack([gap.exp(), label_logit.where(inside, 0), inside.to(gap.dtype)]), given.group)
    _check_owners(given.labels, sums[2], given.ignore_index)
    log_sum = sums[0].log()
    logps = (sums[1] - log_sum).masked_fill_(local == _IGNORED, 0)
    return logps.to(slice_logps.dtype), largest + log_sum


@vocab_parallel_op.register_fake
def _(hidden, *others):
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return logps, logps.new_empty(logps.shape, dtype=torch.float64)


@torch.library.custom_op(
    "dpo_kernels::linear_logps_vocab_parallel_backward",
    mutates_args=(),
    schema="(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor labels, Tensor lse, Tensor? bias,"
    f" {OPTIONS_SCHEMA}, int vocab_start, str group, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
)
def vocab_parallel_backward_op(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db); what is not needed is an empty vector."""
    given = BackwardInputs(*arguments)
    hidden = given.hidden
    local = _local_labels(given.labels, given.ignore_index, given.vocab_start, given.weight.shape[0])
    dX, dW, db = linear_logps_backward_op(*_for_one_process(given, ops.BackwardInputs, local))
    if given.need_hidden and hidden.shape[0] > 0:
        dX = _all_reduce_(dX.to(accumulation_dtype(dX.dtype)), given.group).to(hidden.dtype)
    return dX, dW, db


@vocab_parallel_backward_op.register_fake
def _(*arguments):
    given = BackwardInputs(*arguments)
    return fake_gradients(given, Needs(given.need_hidden, given.need_weight, given.need_bias))


def _setup_context(ctx, inputs, output):
    given, lse = Inputs(*inputs), output[1]
    ctx.options = {name: getattr(given, name) for name in (*OPTIONS, "vocab_start", "group")}
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.hidden, given.weight, given.labels, lse, given.bias)


def _backward(ctx, grad_logps, grad_lse):
    refuse_double_backward("linear_logps_vocab_parallel")
    needs = needed_gradients(Inputs, ctx)
    if grad_logps is None:
        return input_gradients(Inputs, needs)
    hidden, weight, labels, lse, bias = ctx.saved_tensors
    given = BackwardInputs(
        grad_logps=grad_logps,
        hidden=hidden,
        weight=weight,
        labels=labels,
        lse=lse,
        bias=bias,
        **ctx.options,
        need_hidden=needs.hidden,
        need_weight=needs.weight,
        need_bias=needs.bias,
    )
    return input_gradients(Inputs, needs, *vocab_parallel_backward_op(*given))


vocab_parallel_op.register_autograd(_backward, setup_context=_setup_context)
