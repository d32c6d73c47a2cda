"""Every kernel compiles for sm_80, sm_90 and sm_100 with Triton's own ptxas, and fits the chip. No GPU is involved."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia.compiler")

import triton
import triton.language as tl

from benchmarks import kernel_resources
from dpo_kernels.kernels.tile_config import shipped_archs

TENSOR_CORES = {
    "sm_80": ("mma.sync",),
    "sm_89": ("mma.sync",),
    "sm_90": ("wgmma.mma_async",),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "sm_120": ("mma.sync",),
}


def check(found: kernel_resources.Resources, has_dot: bool) -> None:
    limit = kernel_resources.SHARED_MEMORY[found.arch] * 1024
    assert found.spilled_bytes == 0, found
    assert found.shared_bytes <= limit, found
    assert not found.warnings, found
    assert not found.narrow_products, found
    if has_dot:
        assert found.tensor_cores in TENSOR_CORES[found.arch], found


def test_tables_exist_for_the_chips_promised():
    assert set(shipped_archs()) == {"sm_80", "sm_90", "sm_100"}


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, id=f"{arch}-{case.label}")
        for arch in shipped_archs()
        for case in kernel_resources.tile_cases(arch, every_option=False)
    ],
)
def test_every_shipped_configuration(arch, case):
    """With the heaviest options of each."""
    found = case.compile(arch)
    assert len(found) == 1
    check(found[0], has_dot=True)


@pytest.mark.parametrize("arch", shipped_archs())
def test_other_kernels(arch):
    for case in kernel_resources.other_cases(every_option=False):
        for found in case.compile(arch):
            check(found, has_dot=found.kernel == "linear_stats_fwd_kernel")


RAGGED_SLICE = [
    pytest.param(arch, case, id=f"{arch}-{case.label}")
    for arch in ("sm_80", "sm_89", "sm_90")
    for case in kernel_resources.tile_cases(arch, shape=kernel_resources.RAGGED)
    if case.name in ("linear_stats-bias", "slice_grad-bias", "linear_exps-bias-shift") and case.dtype == "bfloat16"
]
"""The widest tiles, whose registers are the scarcest."""


@pytest.mark.parametrize(("arch", "case"), RAGGED_SLICE)
def test_ragged_shapes(arch, case):
    """Where nothing is a multiple of anything, masks take registers that the table's shape leaves free."""
    for found in case.compile(arch):
        check(found, has_dot=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", kernel_resources.SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("kernel", ["linear_stats", "linear_exps", "slice_grad", "filtered"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_option(arch, kernel, shape):
    """Of the Triton that is installed; `make compile-matrix` tries the others."""
    flawed = []
    for case in kernel_resources.tile_cases(arch, shape=shape):
        if case.name.startswith(kernel):
            for found in case.compile(arch):
                if found.flaw() or found.tensor_cores not in TENSOR_CORES[arch]:
                    flawed.append(f"{case.label}: {found}")
    assert not flawed, "\n".join(flawed)


@pytest.mark.slow
@pytest.mark.parametrize("arch", shipped_archs())
def test_every_loss_and_dtype(arch):
    for case in kernel_resources.other_cases():
        for found in case.compile(arch):
            check(found, has_dot=found.kernel == "linear_stats_fwd_kernel")


@triton.jit
def planes_kernel(ptr, plane, WIDE: tl.constexpr):
    rows = tl.program_id(0) * 32 + tl.arange(0, 32)
    if WIDE:
        plane = tl.cast(plane, tl.int64)
    tl.store(ptr + 3 * (plane + 1) + rows, rows)


@pytest.mark.parametrize("wide", [False, True])
def test_a_product_that_would_wrap_is_seen(wide):
    with kernel_resources.compiling_for("sm_90") as compiled:
        planes_kernel[(4,)](torch.empty(0, dtype=torch.int32, device="meta"), 2**30, WIDE=wide)
    found = kernel_resources.inspect_kernel(compiled[0], "sm_90").narrow_products
    assert len(found) == (0 if wide else 1), found


def test_offline_compilation_leaves_triton_as_it_was():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = (driver._active, JITFunction.run)
    with pytest.raises(RuntimeError, match="stop"), kernel_resources.compiling_for("sm_90"):
        raise RuntimeError("stop")
    assert (driver._active, JITFunction.run) == before
