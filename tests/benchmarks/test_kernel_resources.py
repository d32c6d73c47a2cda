"""The committed table of docs/kernels.md: complete, and as good as promised. Nothing is compiled."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia.compiler")

from triton.runtime.jit import JITFunction

import dpo_kernels.kernels
from benchmarks.kernel_resources import COLUMNS, MARKER, Row, describe_config, read_table, update
from dpo_kernels.kernels.offline import SHARED_MEMORY, Resources
from dpo_kernels.kernels.tile_config import shipped_archs, table_entries

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
TILE_KERNELS = {
    "linear_stats_fwd_kernel": ("linear_stats", "linear_exps"),
    "slice_grad_kernel": ("slice_grad", "filtered_grad"),
    "filtered_dx_kernel": ("filtered_dx",),
    "filtered_dw_kernel": ("filtered_dw",),
}
"""Kernels that a tile table names otherwise."""
TENSOR_CORES = {"sm_80": {"mma.sync"}, "sm_90": {"wgmma.mma_async"}, "sm_100": {"tcgen05.mma", "mma.sync"}}


@pytest.fixture(scope="module")
def table() -> list[dict[str, str]]:
    lines = PAGE.read_text().partition(MARKER)[2].strip().splitlines()
    assert lines[0].startswith("triton ")
    assert "ptxas " in lines[0]
    assert lines[2] == "| " + " | ".join(COLUMNS) + " |"
    return [dict(zip(COLUMNS, row, strict=True)) for row in read_table(PAGE.read_text())]


def kernels() -> set[str]:
    """Every kernel that is launched, by its name in the source."""
    modules = [
        importlib.import_module(f"dpo_kernels.kernels.{m.name}")
        for m in pkgutil.iter_modules(dpo_kernels.kernels.__path__)
    ]
    names = {name for m in modules for name, value in vars(m).items() if isinstance(value, JITFunction)}
    return {name for name in names if name.endswith("_kernel")}


def test_every_shipped_configuration_is_in_the_table(table):
    found = {(row["chip"], row["kernel"], row["dtype"], row["configuration"]) for row in table}
    shipped = {
        (arch, kernel, dtype, describe_config(config))
        for arch in shipped_archs()
        for kernel, by_dtype in table_entries(arch).items()
        for dtype, entries in by_dtype.items()
        for _, config in entries
    }
    assert shipped <= found
    tile_kernels = set(table_entries("default"))
    stale = {row for row in found - shipped if row[1] in tile_kernels}
    assert not stale


def test_every_kernel_is_in_the_table_and_explained(table):
    known = kernels()
    assert len(known) >= 9
    text = PAGE.read_text().partition("## Memory")[0]
    for arch in shipped_archs():
        found = {row["kernel"] for row in table if row["chip"] == arch}
        for kernel in known:
            for name in TILE_KERNELS.get(kernel, (kernel,)):
                assert name in found, (
                    f"{arch} {name}: run `python -m benchmarks.kernel_resources --update docs/kernels.md`"
                )
                assert f"| `{name}` |" in text


def test_what_the_table_promises(table):
    tile_kernels = set(table_entries("default"))
    for row in table:
        assert int(row["variants"]) >= 1, row
        assert int(row["spilled"]) == 0, row
        assert 16 <= int(row["registers"]) <= 255, row
        assert float(row["shared KiB"]) <= SHARED_MEMORY[row["chip"]], row
        instructions = set(row["tensor cores"].split(", "))
        assert instructions <= (TENSOR_CORES[row["chip"]] if row["kernel"] in tile_kernels else {"none"}), row


def test_a_row_is_the_worst_of_its_variants():
    found = [
        Resources("k", "sm_90", 90, 0, 1024, 4, "wgmma.mma_async", (), ()),
        Resources("k", "sm_90", 80, 8, 2048, 4, "wgmma.mma_async", ("(C7510) serialised",), ()),
    ]
    cells = dict(zip(COLUMNS, Row("sm_90", "k", "bfloat16", "64x64", found).cells(), strict=True))
    assert (cells["variants"], cells["registers"], cells["spilled"], cells["shared KiB"]) == ("2", "90", "8", "2.0")
    assert cells["tensor cores"] == "wgmma.mma_async, (C7510) serialised"


def test_an_update_replaces_rows_of_the_same_chips_and_kernels():
    def row(chip: str, kernel: str, registers: int) -> list[str]:
        return [chip, kernel, "bfloat16", "64x64", "1", str(registers), "0", "1.0", "none"]

    page = update(f"text\n{MARKER}\n", [row("sm_90", "a", 1), row("sm_90", "b", 2), row("sm_100", "a", 3)], "first")
    assert page.startswith(f"text\n{MARKER}\n\nfirst\n\n| chip |")
    page = update(page, [row("sm_90", "a", 7), row("sm_80", "c", 8)], "second")
    assert page.count(MARKER) == page.count("second") == 1
    assert "first" not in page
    assert read_table(page) == [row("sm_80", "c", 8), row("sm_90", "a", 7), row("sm_90", "b", 2), row("sm_100", "a", 3)]
