"""Products of the native library, for processors on which torch's leave half of the vectors unused.

Legend: m rows and n columns of a result, k terms of its sums.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dpo_kernels import chunks, native


class _ProductArgs(ctypes.Structure):
    """As in ``csrc/products.h``."""

    _fields_ = native.fields(
        "a b out scratch",
        "rows columns depth a_row a_depth b_depth b_column out_row",
        "",
        "accumulate threads",
    )


def faster() -> bool:
    """Whether these products are faster than torch's: MKL runs its AVX2 code on processors that are not Intel's."""
    return native.library() is not None and native.isa() == "avx512" and _mkl_lacks_avx512()


def _mkl_lacks_avx512() -> bool:
    return torch.backends.mkl.is_available() and not native.made_by_intel()


def product_(out_mn: Tensor, a_mk: Tensor, b_kn: Tensor, *, accumulate: bool = False) -> None:
    """As ``dpo_kernels.chunks.product_``, in the library where that is faster and the matrices are what it takes."""
    if faster() and _fits(out_mn, a_mk, b_kn):
        compute_(out_mn, a_mk, b_kn, accumulate=accumulate)
    else:
        chunks.product_(out_mn, a_mk, b_kn, accumulate=accumulate)


def _fits(out_mn: Tensor, a_mk: Tensor, b_kn: Tensor) -> bool:
    """Whether all are what ``compute_`` takes."""
    matrices = (out_mn, a_mk, b_kn)
    plain = all(m.dtype == torch.float32 and m.device.type == "cpu" and m.numel() > 0 for m in matrices)
    return plain and _unit_columns(out_mn) and all(_unit_columns(m) or _unit_columns(m.T) for m in (a_mk, b_kn))


def _unit_columns(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def compute_(out_mn: Tensor, a_mk: Tensor, b_kn: Tensor, *, accumulate: bool = False) -> None:
    """out = a b, or out += a b, in float32. The number of threads changes no bit.

    ``out`` has unit stride along n, a and b along either of theirs; no size is 0.
    """
    (m, n), k = out_mn.shape, a_mk.shape[1]
    assert a_mk.shape == (m, k)
    assert b_kn.shape == (k, n)
    assert _unit_columns(out_mn)
    a_row, a_depth = _steps(a_mk)
    b_column, b_depth = _steps(b_kn.T)
    args = _ProductArgs(rows=m, columns=n, depth=k, threads=native.threads(), accumulate=accumulate)
    args.a_row, args.a_depth, args.b_depth, args.b_column, args.out_row = (
        a_row,
        a_depth,
        b_depth,
        b_column,
        out_mn.stride(0),
    )
    scratch = torch.empty(native.scratch_bytes("product", args), dtype=torch.uint8)
    for name, matrix in (("a", a_mk), ("b", b_kn), ("out", out_mn), ("scratch", scratch)):
        setattr(args, name, matrix.data_ptr())
    native.call("product", args)


def _steps(matrix: Tensor) -> tuple[int, int]:
    """Strides, of which one is 1; that of a size of 1 means nothing."""
    rows, columns = matrix.stride()
    if _unit_columns(matrix):
        return rows, 1
    assert _unit_columns(matrix.T)
    return 1, columns


def scratch_bytes(m: int, n: int, k: int) -> int:
    """Most that ``product_`` holds beside its matrices, where torch does not compute it."""
    if not faster():
        return 0
    args = (_ProductArgs(rows=m, columns=n, depth=k, a_depth=step, threads=native.threads()) for step in (0, 1))
    return max(native.scratch_bytes("product", each) for each in args)
