"""Blocks of a logits matrix in plain torch: what the ``torch`` implementations of both ops share.

Legend: T rows, D features, V vocabulary, n rows of a block, v columns of a slice, C the accumulation dtype (float32, or
float64 for float64 inputs).

Logits are only ever held for some rows or some columns, in C. Elementwise passes run over small blocks of rows of such
a buffer, so that a block stays in cache from its first read to its last write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.head import Head

BUFFER_BYTES = 96 * 2**20
"""Size of the logits buffer."""
CACHE_BYTES = 2**20
"""Size of a block of the elementwise passes."""
CAST_BYTES = 8 * 2**20
"""Size of the block in which a weight is converted, where products need another dtype than the weight's."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def early_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient that waits for its upstream factor: float16 would lose what a loss scale saves."""
    return torch.float32 if dtype == torch.float16 else dtype


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that products take: the tensor's own where a product of it accumulates in C and returns C, else C."""
    widens = tensor.device.type == "cuda" and torch.version.hip is None
    return tensor.dtype if widens else accumulation_dtype(tensor.dtype)


def even_slices(length: int, largest: int) -> Iterator[slice]:
    """Cut range(length) into as few slices of at most ``largest`` (at least 1) as possible, of nearly equal size."""
    count = -(-length // max(1, largest))
    for i in range(count):
        yield slice(length * i // count, length * (i + 1) // count)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix in blocks that fit a cache; on a GPU all at once."""
    row_bytes = max(1, matrix.shape[1] * matrix.element_size())
    yield from even_slices(matrix.shape[0], matrix.shape[0] if matrix.is_cuda else CACHE_BYTES // row_bytes)


def product_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a b, or out += a b, with ``out`` in C and a, b in the dtype of products."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def scale_rows_(out_nD: Tensor, rows_nD: Tensor, factor_n: Tensor) -> None:
    """out = rows, each times its factor; rounded once, to the dtype of ``out``."""
    torch.mul(rows_nD, factor_n.unsqueeze(1), out=out_nD)


def weight_blocks(weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the dtype of products: as it is, or by converted blocks of its rows."""
    dtype = operand_dtype(weight_VD)
    V, D = weight_VD.shape
    largest = V if dtype == weight_VD.dtype else max(64, CAST_BYTES // (D * dtype.itemsize))
    for rows in even_slices(V, largest):
        yield rows, weight_VD[rows].to(dtype)


def logits_(a_nv: Tensor, head: Head, columns: slice, *, want_factor: bool = False) -> Tensor | None:
    """Turn x W^T into logits, in place: bias, scale, softcap, temperature.

    Returns:
        On request and with a softcap, 1 - tanh^2: what ``Head.slope`` leaves out of dz / da. It comes from the tanh
        itself, since going back from z would add to the cancellation where the cap saturates.
    """
    if head.bias_V is not None:
        a_nv.add_(head.bias_V[columns])
    if head.softcap is None:
        if head.slope != 1:
            a_nv.mul_(head.slope)
        return None
    a_nv.mul_(head.logit_scale / head.softcap).tanh_()
    factor = a_nv.square().neg_().add_(1) if want_factor else None
    a_nv.mul_(head.softcap / head.temperature)
    return factor


def add_at_(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """matrix[i, columns[i]] += values[i]: one element a row, so no order of additions matters."""
    index = columns.unsqueeze(1)
    matrix.scatter_(1, index, matrix.gather(1, index) + values.unsqueeze(1))


def ignored_rows(labels_T: Tensor, ignore_index: int) -> Tensor | None:
    """Mask of ignored rows; None where a look at the labels is cheap and finds none."""
    ignored_T = labels_T == ignore_index
    return ignored_T if labels_T.is_cuda or bool(ignored_T.any()) else None


def used_rows(ignored_T: Tensor | None) -> Tensor | None:
    """Indices of rows that count, to drop the others before any product; None to use all, as on a GPU, where the
    number of rows would have to be waited for."""
    return None if ignored_T is None or ignored_T.is_cuda else (~ignored_T).nonzero().squeeze(1)


def spread_rows(rows: Tensor, used: Tensor | None, num_rows: int) -> Tensor:
    """Undo ``tensor[used]``, with zeros for what was dropped."""
    if used is None:
        return rows
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, used, rows)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without waiting for it: what lies on the host goes through page-locked memory, which
    torch keeps until the copy is done, or for as long as a CUDA graph that holds the copy."""
    if device.type == "cuda" and values.device.type == "cpu" and not values.is_pinned():
        # Not pin_memory(), which fake tensors lack.
        values = torch.empty_like(values, pin_memory=True).copy_(values)
    return values.to(device, non_blocking=True)


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Inside, matrix products are what their callers say: no autocast, no partial sums that cuBLAS rounds to 16 bits
    (its way with few rows and a long sum, such as that over the vocabulary), and no TunableOp, which refuses float32
    results of 16-bit operands."""
    with ExitStack() as undo:
        undo.enter_context(torch.autocast(device_type, enabled=False))
        if device_type == "cuda":
            settings = torch.backends.cuda.matmul
            for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
                # Without split sums there is nothing to round.
                if getattr(settings, name) and getattr(settings, f"{name}_split_k", True):
                    undo.callback(setattr, settings, name, True)
                    setattr(settings, name, False)
            if torch.cuda.tunable.is_enabled():
                undo.callback(torch.cuda.tunable.enable, True)
                torch.cuda.tunable.enable(False)
        yield


def sum_responses(values_T: Tensor, lengths_S: Tensor) -> Tensor:
    """Sums of consecutive segments, in float64 and in a fixed order, rounded once. Lengths are trusted."""
    sums = torch.segment_reduce(values_T.double(), "sum", lengths=lengths_S, unsafe=True, initial=0)
    return sums.to(values_T.dtype)


class Chunk(NamedTuple):
    """Consecutive pairs that are scored together."""

    first_pair: int
    num_pairs: int
    split: bool
    """True for a single pair that does not fit the buffer."""

    def offsets(self, cu_responses: list[int]) -> list[int]:
        """Where the responses of these pairs begin among the rows of the call, and where the last one ends."""
        return cu_responses[2 * self.first_pair : 2 * (self.first_pair + self.num_pairs) + 1]


def plan_chunks(cu_responses: Sequence[int], max_rows: int, max_rows_of_pair: int) -> list[Chunk]:
    """Whole pairs in chunks of at most ``max_rows``, about equally full.

    A longer pair is a chunk of its own, held whole up to ``max_rows_of_pair`` rows and split beyond that.
    """
    ends = cu_responses[::2]
    num_pairs = len(ends) - 1
    target = max(1, -(-ends[-1] // max(1, -(-ends[-1] // max_rows))))
    chunks: list[Chunk] = []
    first = 0
    while first < num_pairs:
        last = first + 1
        while last < num_pairs and ends[last] - ends[first] < target and ends[last + 1] - ends[first] <= max_rows:
            last += 1
        chunks.append(Chunk(first, last - first, ends[last] - ends[first] > max(max_rows, max_rows_of_pair)))
        first = last
    return chunks
