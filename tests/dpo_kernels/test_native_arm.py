"""The native library on 64-bit ARM, by an emulator: what its tests on the processor at hand ask of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dpo_kernels import native
from tests.dpo_kernels import native_driver
from tests.dpo_kernels.native_driver import Driver
from tests.dpo_kernels.test_native_passes import (  # noqa: F401
    test_conversions_are_torchs,
    test_exponentials_in_the_whole_range,
    test_first_of_equal_logits_is_the_top,
    test_gradient_of_a_slice,
    test_nan_and_infinities_as_torch,
    test_no_rows,
    test_peaked_rows_lose_nothing_at_the_label,
    test_saturated_softcap_keeps_its_slope,
    test_slices_add_up,
    test_threads_and_repetition_change_no_bit,
    test_whole_rows,
)
from tests.dpo_kernels.test_native_products import (  # noqa: F401
    test_as_near_as_torch,
    test_denormal_results_are_kept,
    test_nan_and_infinity_stay_in_their_rows_and_columns,
)
from tests.engine.model import test_native_attention as attention
from tests.engine.model.test_native_attention import (  # noqa: F401
    test_any_strides,
    test_chunks_are_windows_that_do_not_move,
    test_nan_and_infinity_pass_as_in_the_open,
    test_nan_in_a_response_stays_there,
)

pytestmark = pytest.mark.skipif(native_driver.why_not() is not None, reason=str(native_driver.why_not()))
ISAS = ("plain", "neon")


@pytest.fixture(scope="module")
def drivers() -> Iterator[dict[str, Driver]]:
    running = {name: Driver(name) for name in ISAS}
    yield running
    for driver in running.values():
        driver.close()


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, drivers, monkeypatch) -> str:
    """Calls of the library go to the emulator."""
    monkeypatch.setattr(native, "call", drivers[request.param].call)
    monkeypatch.setattr(native, "scratch_bytes", lambda name, args: native_driver.SCRATCH_BYTES)
    return request.param


def test_instruction_set_by_name(isa, drivers) -> None:
    assert (drivers[isa].isa, drivers[isa].interface) == (isa, native.INTERFACE)
    best = Driver()
    assert best.isa == "neon"
    best.close()
    with pytest.raises(AssertionError, match="exit code 2"):
        Driver("avx2")


# One dtype where there are many tokens: emulated floating point takes seconds.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, shape in attention.SHAPES.items()
        for dtype in attention.backend.DTYPES
        if shape.segments is attention.SHORT or dtype == torch.float32
    ],
)
def test_attention_is_exact(name: str, dtype: torch.dtype) -> None:
    attention.assert_as_exact(attention.Problem(attention.SHAPES[name], dtype))


@pytest.mark.parametrize("name", ["capped", "long, window, sinks"])
def test_large_scores_are_exact(name: str) -> None:
    attention.assert_as_exact(attention.Problem(attention.SHAPES[name], scale=100.0))


@pytest.mark.parametrize("name", ["grouped", "capped, sinks, window"])
def test_threads_and_runs_change_no_bit(name: str) -> None:
    attention.test_threads_and_runs_change_no_bit(name)
