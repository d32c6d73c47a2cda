"""Attention on the CPU in C++ (``csrc/attention.h``): one call for a pack, forward and backward.

Keys are read where they lie, so a shared prompt is not copied for each response; scores are held a block at a time.
Whatever the dtype, sums are float32, and no bit depends on the number of threads.

Letters: T packed tokens, H query heads, K key heads, D width of keys, V width of values, Q segments.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dpo_kernels import native

from ...packing.layout import AttentionPlan
from .scores import Scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of their codes."""
_OPTIONS = "float scaling, int window, int chunk, float softcap"


def native_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Attention of a pack over keys and values that are not gathered.

    Args:
        query: [1, H, T, D] of one of ``DTYPES``, on the CPU.
        key: [1, K, T, D], K dividing H.
        value: [1, K, T, V].
        plan: the pack's plan.
        scores: options of the layer.

    Returns:
        [1, T, H, V].
    """
    inputs = [x[0].transpose(0, 1) for x in (query, key, value)]
    sinks = None if scores.sinks is None else scores.sinks.to(torch.float32)
    options = (scores.scaling, scores.window or 0, scores.chunk or 0, scores.softcap or 0.0)
    output, _ = packed_attention_op(*inputs, sinks, _segments(plan), *options)
    return output[None]


def _segments(plan: AttentionPlan) -> Tensor:
    """int64 [Q, 4], kept with the pack so that its layers share it."""
    if "segments" not in plan.masks:
        plan.masks["segments"] = torch.tensor(plan.segments, dtype=torch.int64)
    return plan.masks["segments"]


class _Args(ctypes.Structure):
    """``AttentionArgs`` of ``csrc/attention.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "query", "key", "value", "sinks", "segments", "output", "scales",
            "grad_output", "grad_query", "grad_key", "grad_value", "grad_sinks", "scratch",
        )),
        *((name, ctypes.c_int64) for name in (
            "num_segments", "num_tokens", "query_heads", "key_heads", "key_dim", "value_dim",
            *(f"{of}_{step}" for of in ("query", "key", "value", "grad") for step in ("token", "head")),
            "window", "chunk",
        )),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "threads", "failed", "unused")),
    ]  # fmt: skip


@torch.library.custom_op(
    "dpo_engine::packed_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor segments, {_OPTIONS})"
    " -> (Tensor output, Tensor scales)",
)
def packed_attention_op(query, key, value, sinks, segments, scaling, window, chunk, softcap) -> tuple[Tensor, Tensor]:
    """Output [T, H, V], and the softmax's scales for the backward pass, float32 [H, T, 2].

    Queries are [T, H, D], keys [T, K, D], values [T, K, V], sinks float32 [H]; ``segments`` is int64 [Q, 4], rows as
    ``Segment``; a ``window``, ``chunk`` or ``softcap`` of 0 is none.
    """
    _check(query, key, value, sinks, segments)
    sinks = None if sinks is None else sinks.contiguous()
    output, scales = _empty_outputs(query, value)
    tensors = {"query": query, "key": key, "value": value, "sinks": sinks, "segments": segments}
    _call("forward", **tensors, output=output, scales=scales, options=(scaling, window, chunk, softcap))
    return output, scales


@torch.library.custom_op(
    "dpo_engine::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor segments, Tensor output,"
    f" Tensor scales, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def packed_attention_backward_op(
    grad, query, key, value, sinks, segments, output, scales, scaling, window, chunk, softcap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and sinks, the last float32 and empty without sinks."""
    sinks = None if sinks is None else sinks.contiguous()
    output, scales = output.contiguous(), scales.contiguous()
    grads = _empty_gradients(query, key, value, sinks)
    grad_query, grad_key, grad_value, grad_sinks = grads
    tensors = {"query": query, "key": key, "value": value, "sinks": sinks, "segments": segments}
    others = {"output": output, "scales": scales, "grad_query": grad_query, "grad_key": grad_key}
    others |= {"grad_value": grad_value, "grad_sinks": None if sinks is None else grad_sinks}
    _call("backward", **tensors, **others, grad_output=grad, options=(scaling, window, chunk, softcap))
    return grads


@packed_attention_op.register_fake
def _(query, key, value, sinks, segments, scaling, window, chunk, softcap):
    return _empty_outputs(query, value)


@packed_attention_backward_op.register_fake
def _(grad, query, key, value, sinks, segments, output, scales, scaling, window, chunk, softcap):
    return _empty_gradients(query, key, value, sinks)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scaling, window, chunk, softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (scaling, window, chunk, softcap)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _grad_scales):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "packed attention has no second derivative: call backward() or autograd.grad() without create_graph=True"
        )
    query, key, value, sinks, *others = ctx.saved_tensors
    grads = packed_attention_backward_op(grad, query, key, value, sinks, *others, *ctx.options)
    return *grads[:3], None if sinks is None else grads[3], None, None, None, None, None


packed_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    return query.new_empty(tokens, heads, value.shape[2]), query.new_empty(heads, tokens, 2, dtype=torch.float32)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    return grad_query, grad_key, grad_value, query.new_empty(0 if sinks is None else len(sinks), dtype=torch.float32)


def _check(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, segments: Tensor) -> None:
    """Raise ``ValueError`` for what the C++ would read or write beyond."""
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"expected one dtype of {DTYPES}, got {query.dtype}, {key.dtype}, {value.dtype}")
    if segments.dtype != torch.int64 or segments.ndim != 2 or segments.shape[1] != 4:
        raise ValueError(f"expected int64 [segments, 4] segments, got {segments.dtype} {list(segments.shape)}")
    given = (query, key, value, segments, *(() if sinks is None else (sinks,)))
    if elsewhere := {x.device.type for x in given} - {"cpu"}:
        raise ValueError(f"native attention computes on the CPU, got tensors on {', '.join(sorted(elsewhere))}")
    tokens, heads, width = query.shape
    key_heads = key.shape[1]
    if key.shape != (tokens, key_heads, width) or value.shape[:2] != (tokens, key_heads) or heads % key_heads:
        raise ValueError(
            f"shapes of queries, keys and values do not match: {list(query.shape)}, {list(key.shape)}, "
            f"{list(value.shape)}"
        )
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype != torch.float32):
        raise ValueError(f"expected float32 [{heads}] sinks, got {sinks.dtype} {list(sinks.shape)}")
    end, owners = 0, {}
    for start, stop, prefix_start, prefix_stop in segments.tolist():
        if start != end or stop <= start:
            raise ValueError(f"segments do not follow each other: one begins at {start} and ends at {stop} after {end}")
        end = stop
        if prefix_stop == prefix_start:
            owners[start] = stop
        elif not prefix_start < prefix_stop <= owners.get(prefix_start, 0):
            raise ValueError(f"keys {prefix_start}:{prefix_stop} are not the beginning of a segment before {start}")
    if end != tokens:
        raise ValueError(f"segments end at {end}, there are {tokens} tokens")


def _call(
    direction: str,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    options: tuple[float, int, int, float],
    grad_output: Tensor | None = None,
    **others: Tensor | None,
) -> None:
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    strided = {"query": query, "key": key, "value": value}
    if grad_output is not None:
        grad_output = strided["grad"] = _unit_stride(grad_output)
    segments = segments.contiguous()
    pointers = {"query": query, "key": key, "value": value, "segments": segments, "grad_output": grad_output, **others}
    scaling, window, chunk, softcap = options
    if window < 0 or chunk < 0:
        raise ValueError(f"window and chunk must be 0 (none) or positive, got {window} and {chunk}")
    # More than there are tokens is all of them.
    window, chunk = (min(size, query.shape[0]) for size in (window, chunk))
    args = _sizes(query, key, value, segments)
    values = {name: native.pointer(x) for name, x in pointers.items()}
    values |= {f"{name}_token": x.stride(0) for name, x in strided.items()}
    values |= {f"{name}_head": x.stride(1) for name, x in strided.items()}
    for name, number in values.items():
        setattr(args, name, number)
    args.scaling, args.window, args.chunk, args.softcap = scaling, window, chunk, softcap
    scratch = torch.empty(native.scratch_bytes(f"attention_{direction}", args), dtype=torch.uint8)
    args.scratch = scratch.data_ptr()
    native.call(f"attention_{direction}", args)
    if args.failed:
        raise MemoryError(f"attention over {query.shape[0]} tokens: no memory for its tasks")


def scratch_bytes(direction: str, query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> int:
    """Memory that a pass, "forward" or "backward", holds beside its inputs and results; only ``segments`` need data."""
    return native.scratch_bytes(f"attention_{direction}", _sizes(query, key, value, segments))


def _sizes(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> _Args:
    """What a call says of its work without its tensors' data, of ``segments`` alone with."""
    return _Args(
        segments=segments.data_ptr(),
        num_segments=len(segments),
        num_tokens=query.shape[0],
        query_heads=query.shape[1],
        key_heads=key.shape[1],
        key_dim=query.shape[2],
        value_dim=value.shape[2],
        dtype=DTYPES.index(query.dtype),
        threads=native.threads(),
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
