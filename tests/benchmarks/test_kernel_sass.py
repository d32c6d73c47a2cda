"""The machine code of the widest tiles on sm_90, as the installed Triton makes it. No GPU is involved."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia.compiler")

from benchmarks import kernel_resources
from benchmarks.kernel_sass import Sass
from dpo_kernels.kernels.offline import compiling_for

BUDGETS = {"linear_stats": 900, "linear_exps": 1200, "slice_grad": 1000}
"""Instructions of a warp after its products: what Triton 3.6 to 3.9 need at most, and a tenth more."""


@pytest.mark.parametrize("kernel", BUDGETS)
def test_the_main_loop_never_drains_and_the_epilogue_is_short(kernel):
    (case,) = (
        case
        for case in kernel_resources.tile_cases("sm_90")
        if case.name == kernel and case.dtype == "bfloat16" and case.config.block_v == 256
    )
    with compiling_for("sm_90") as compiled:
        case.launch()
    sass = Sass.of(compiled[0])
    waits = sass.waits_in_loop()
    assert waits, "no wait for products in the main loop"
    assert min(waits) >= 1, waits
    assert 100 < sass.epilogue() <= BUDGETS[kernel], sass.epilogue()


LISTING = """
.L_x_0:
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR28], R24, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   FADD R1, R1, R1 ;
        /*0070*/                   FADD R1, R1, R1 ;
.L_x_1:
        /*0080*/                   BRA.DIV UR4, `(.L_x_3) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
.L_x_3:
        /*00b0*/                   FADD R1, R1, R1 ;
        /*00c0*/                   BRA `(.L_x_1) ;
"""


def test_counts_of_a_listing():
    """The wait after the loop is no part of it, and what most tiles skip is not counted."""
    sass = Sass.read(LISTING)
    assert sass.waits_in_loop() == [1]
    assert sass.epilogue() == len(["wait of the loop", "BRA", "wait", "BRA", "BRA.DIV", "EXIT"])
    assert Sass.read(LISTING.replace("gsb0, 0x1", "gsb0, 0x0")).waits_in_loop() == [0]
