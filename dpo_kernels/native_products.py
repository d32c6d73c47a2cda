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
        "a b out",
        "rows columns depth a_row a_depth b_depth b_column out_row",
        "",
        "accumulate threads failed",
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
    return all(
        matrix.dtype == torch.float32 and matrix.device.type == "cpu" and matrix.numel() > 0
        for matrix in (out_mn, a_mk, b_kn)
    )


def compute_(out_mn: Tensor, a_mk: Tensor, b_kn: Tensor, *, accumulate: bool = False) -> None:
    """out = a b, or out += a b, in float32. The number of threads changes no bit.

    ``out`` has unit stride along n, a and b along either of theirs; no size is 0.

    Raises:
        MemoryError: there is none for packed operands.
    """
    args = _arguments(out_mn, a_mk, b_kn)
    args.accumulate = accumulate
    native.call("product", args)
    if args.failed:
        raise MemoryError("no memory for the operands of a matrix product")


def _arguments(out_mn: Tensor, a_mk: Tensor, b_kn: Tensor) -> _ProductArgs:
    m, n, k = *out_mn.shape, a_mk.shape[1]
    assert a_mk.shape == (m, k)
    assert b_kn.shape == (k, n)
    assert out_mn.stride(1) == 1 or n == 1
    a_row, a_depth = _steps(a_mk)
    b_column, b_depth = _steps(b_kn.T)
    return _ProductArgs(
        a=a_mk.data_ptr(),
        b=b_kn.data_ptr(),
        out=out_mn.data_ptr(),
        rows=m,
        columns=n,
        depth=k,
        a_row=a_row,
        a_depth=a_depth,
        b_depth=b_depth,
        b_column=b_column,
        out_row=out_mn.stride(0),
        threads=native.threads(),
    )


def _steps(matrix: Tensor) -> tuple[int, int]:
    """Strides, of which one is 1; that of a size of 1 means nothing."""
    rows, columns = matrix.stride()
    if columns == 1 or matrix.shape[1] == 1:
        return rows, 1
    assert rows == 1 or matrix.shape[0] == 1
    return 1, columns


def scratch_bytes(m: int, n: int, k: int) -> int:
    """Most that ``product_`` holds beside its matrices, where torch does not compute it."""
    if not faster():
        return 0
    shapes = [torch.empty(size, device="meta") for size in ((m, n), (m, k), (k, n))]
    return native.scratch_bytes("product", _arguments(*shapes))
