"""Elementwise passes of the native library over blocks of logits: what the ``native`` implementations replace.

Legend: n rows of a block, v columns of it, D features. Blocks are float32 with unit stride along v and hold x W^T.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels import native
from dpo_kernels.head import Head
from dpo_kernels.linear_logps.stats import RunningStats
from dpo_kernels.linear_logps.tile_filter import COLUMNS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See ``dpo_kernels.linear_logps.interface``."""
    if device.type != "cpu":
        return "the native extension computes on the CPU"
    if dtype not in DTYPES:
        return f"the native extension computes in float32; {str(dtype).removeprefix('torch.')} is for torch"
    return native.why_not()


class Keep(IntEnum):
    """What ``fold_`` leaves in a block; with a softcap each but the first also times 1 - tanh^2."""

    INPUT = 0
    EXPS = 1
    """e^(z - max)"""
    EXPS_LESS_LABEL = 2
    """(softmax - onehot) times the sum of exponentials, of blocks that hold whole rows."""


class _FoldArgs(ctypes.Structure):
    """As in ``csrc/logits.h``, like the others."""

    _fields_ = native.fields(
        "block bias label max sum label_logit label_factor weighted top top_column logit_sum entropy square tile_sum",
        "stride rows columns first_column weighted_stride weighted_columns tile_stride tile_columns",
        "inner outer",
        "form keep threads",
    )


class _GradientArgs(ctypes.Structure):
    _fields_ = native.fields(
        "block bias label shift softmax_factor coefficient",
        "stride rows columns first_column",
        "inner outer",
        "form threads",
    )


class _ConvertArgs(ctypes.Structure):
    _fields_ = native.fields("in out factor", "in_stride out_stride rows columns", "", "in_dtype out_dtype threads")


def _block(
    block_nv: Tensor, labels_n: Tensor, head: Head, first_column: int, bias_v: Tensor | None
) -> dict[str, object]:
    """What both passes say of their block."""
    (n, v), stride = block_nv.shape, block_nv.stride()
    assert block_nv.dtype == torch.float32
    assert stride[1] == 1 or v == 1
    assert labels_n.dtype == torch.int64
    assert labels_n.is_contiguous()
    inner, outer = head.slope, 1.0
    if head.softcap is not None:
        inner, outer = head.logit_scale / head.softcap, head.softcap / head.temperature
    return {
        "block": block_nv.data_ptr(),
        "bias": native.pointer(bias_v),
        "label": labels_n.data_ptr(),
        "stride": stride[0],
        "rows": n,
        "columns": v,
        "first_column": first_column,
        "inner": inner,
        "outer": outer,
        "form": int(head.softcap is not None),
        "threads": native.threads(),
    }


def _bias_of(head: Head, first_column: int, v: int) -> Tensor | None:
    return None if head.bias_V is None else head.bias_V[first_column : first_column + v].float()


class Found(NamedTuple):
    """What ``fold_`` has found of some rows. All but ``weighted_nD`` and ``tile_sum_nC`` are contiguous."""

    max_n: Tensor
    """float32, like all others: the largest logit so far, -inf at first; becomes finite."""
    sum_n: Tensor
    """Sum of exponentials relative to ``max_n``, 0 at first."""
    label_logit_n: Tensor
    """Written where the label is among the columns, like the next."""
    label_factor_n: Tensor | None = None
    """1 - tanh^2 of the softcap at the label."""
    weighted_nD: Tensor | None = None
    """Whatever else is relative to ``max_n``, and moves with it; any row stride."""
    stats: RunningStats | None = None
    tile_sum_nC: Tensor | None = None
    """Written: sums of exponentials of tiles of COLUMNS columns, but for the label's own; any row stride."""


def fold_(
    block_nv: Tensor, labels_n: Tensor, head: Head, first_column: int, found: Found, keep: Keep = Keep.INPUT
) -> None:
    """Add columns of x W^T to what was found in earlier columns of the same rows; the block ends as ``keep`` says.

    Args:
        block_nv: columns from ``first_column`` on of the head's V.
        labels_n: int64, among all V.
    """
    bias_v = _bias_of(head, first_column, block_nv.shape[1])
    args = _FoldArgs(**_block(block_nv, labels_n, head, first_column, bias_v), keep=keep)
    max_n, sum_n, label_logit_n, label_factor_n, weighted_nD, stats, tile_sum_nC = found
    rows = {"max": max_n, "sum": sum_n, "label_logit": label_logit_n, "label_factor": label_factor_n}
    if stats is not None:
        wanted = {
            "is_top1": {"top": stats.top_T, "top_column": stats.top_column_T},
            "mean_logits": {"logit_sum": stats.logits_T},
            "entropy": {"entropy": stats.entropy_T},
            "log_sum_sq_probs": {"square": stats.square_T},
        }
        for name in stats.names:
            rows |= wanted[name]
    for name, values in rows.items():
        assert values is None or (values.is_contiguous() and len(values) == len(block_nv))
        setattr(args, name, native.pointer(values))
    if weighted_nD is not None:
        args.weighted, args.weighted_stride = weighted_nD.data_ptr(), weighted_nD.stride(0)
        args.weighted_columns = weighted_nD.shape[1]
    if tile_sum_nC is not None:
        args.tile_sum, args.tile_stride, args.tile_columns = tile_sum_nC.data_ptr(), tile_sum_nC.stride(0), COLUMNS
    native.call("fold", args)


def gradient_(
    block_nv: Tensor,
    labels_n: Tensor,
    head: Head,
    first_column: int,
    *,
    shift_n: Tensor,
    softmax_factor_n: Tensor,
    coefficient_n: Tensor,
) -> None:
    """Turn columns of x W^T into coefficient * (onehot - softmax_factor e^(z - shift)) * (1 - tanh^2 of the softcap).

    All of rows are float32, contiguous; ``labels_n`` are int64 among all V, or of no column here.
    """
    bias_v = _bias_of(head, first_column, block_nv.shape[1])
    args = _GradientArgs(**_block(block_nv, labels_n, head, first_column, bias_v))
    rows = {"shift": shift_n, "softmax_factor": softmax_factor_n, "coefficient": coefficient_n}
    for name, values in rows.items():
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        assert len(values) == len(block_nv)
        setattr(args, name, values.data_ptr())
    native.call("gradient", args)


def convert_(out_nD: Tensor, rows_nD: Tensor, factor_n: Tensor | None = None) -> Tensor:
    """out = rows, each times its factor, computed in float32 and rounded once; float32, bfloat16 or float16 in and out.

    Unit stride along D; ``factor_n`` is float32 and contiguous. Returns ``out_nD``.
    """
    for matrix in (out_nD, rows_nD):
        assert matrix.stride(1) == 1 or matrix.shape[1] == 1
    assert out_nD.shape == rows_nD.shape
    assert factor_n is None or (factor_n.dtype == torch.float32 and factor_n.is_contiguous())
    args = _ConvertArgs(out=out_nD.data_ptr(), factor=native.pointer(factor_n), threads=native.threads())
    setattr(args, "in", rows_nD.data_ptr())
    args.in_stride, args.out_stride = rows_nD.stride(0), out_nD.stride(0)
    args.rows, args.columns = rows_nD.shape
    args.in_dtype, args.out_dtype = DTYPES[rows_nD.dtype], DTYPES[out_nD.dtype]
    native.call("convert", args)
    return out_nD
