"""Numbers of Arrow and of numpy in the same memory.

pyarrow's own conversions import pandas to see whether they are given something of it, which takes longer than reading
the references of a small run.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def arrow_of(values: np.ndarray) -> pa.Array:
    """An Arrow array of the numbers of a flat array, which is copied only where it is not contiguous."""
    # Arrow has eight truth values in a byte.
    assert values.dtype != bool
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def numpy_of(values: pa.Array) -> np.ndarray:
    """The numbers of an Arrow array without nulls, on its buffer, which cannot be written to."""
    assert not values.null_count
    assert not pa.types.is_boolean(values.type)
    dtype = np.dtype(values.type.to_pandas_dtype())
    if not len(values):
        return np.empty(0, dtype)
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)
