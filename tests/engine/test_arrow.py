from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from engine.arrow import arrow_of, numpy_of


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64])
def test_numbers_are_the_same_on_both_sides(dtype):
    values = np.arange(7).astype(dtype)
    made = arrow_of(values)
    assert made.equals(pa.array(values))
    for part in (made, made[2:], made[2:5], made[:0]):
        found = numpy_of(part)
        assert found.dtype == dtype
        assert found.tolist() == part.to_pylist()
    assert arrow_of(values[::2]).to_pylist() == values[::2].tolist()
    assert np.shares_memory(numpy_of(made), values)


def test_what_is_absent_is_no_number():
    with pytest.raises(AssertionError):
        numpy_of(pa.array([1.0, None]))


def test_truth_values_are_no_numbers():
    with pytest.raises(AssertionError):
        numpy_of(pa.array([True] * 9))
    with pytest.raises(AssertionError):
        arrow_of(np.ones(9, bool))
