"""Compile every Triton kernel for chips that need not be here, and print what each takes of them.

    python -m benchmarks.kernel_resources [--arch sm_90] [--kernel slice_grad] [--update docs/kernels.md]

One row per kernel and shipped configuration, the worst over every set of options that compiles to a kernel of its own.
``--update`` puts the rows into the table of a page, in place of those of the same chips and kernels. All of them take
half an hour of a processor; after a change of one kernel, or with a new one, only its rows have to be made anew.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from dpo_kernels.head import Head
from dpo_kernels.kernels import (
    bfloat16_weights,
    filtered_products,
    frozen_head,
    paired_loss,
    scale,
    slice_grad,
    softmax_grad,
    tile_logps,
    tile_mass,
)
from dpo_kernels.kernels.offline import SHARED_MEMORY, Resources, compiling_for, inspect_kernel
from dpo_kernels.kernels.tile_config import TileConfig, shipped_archs, table_entries
from dpo_kernels.pairs import F_DIVERGENCES, LossOptions
from engine.train.bfloat16 import ROUNDS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Shape(NamedTuple):
    """Rows, features and vocabulary of a launch. What is divisible by what decides on the code."""

    N: int
    D: int
    V: int


TABLE_SHAPE = Shape(8192, 4096, 128256)
RAGGED = Shape(8191, 4120, 50257)
"""Nothing is a multiple of a tile, and rows begin at multiples of 16 bytes, but not of 16 elements."""
SHAPES = (TABLE_SHAPE, RAGGED, Shape(8192, 4160, 50257))
"""With the table's and ragged ones the kind of shape that training meets most: whole tiles of rows, any vocabulary."""
PRODUCTS = ("filtered_dx", "filtered_dw")
"""Tile kernels that meet no logits, and so none of their options."""
MARKER = "<!-- what follows is written by `python -m benchmarks.kernel_resources --update docs/kernels.md` -->"
COLUMNS = "chip", "kernel", "dtype", "configuration", "variants", "registers", "spilled", "shared KiB", "tensor cores"


@dataclass(frozen=True)
class Case:
    """One launcher call whose kernels are looked at."""

    name: str
    dtype: str
    launch: Callable[[], Any]
    config: TileConfig | None = None

    def compile(self, arch: str) -> list[Resources]:
        with compiling_for(arch) as compiled:
            self.launch()
        return [inspect_kernel(kernel, arch) for kernel in compiled]

    @property
    def kernel(self) -> str:
        """Its name in the tile tables, or of the case."""
        return self.name.partition("-")[0]

    @property
    def label(self) -> str:
        return f"{self.name}-{self.dtype}" + ("" if self.config is None else "-" + describe_config(self.config))


def describe_config(config: TileConfig) -> str:
    loads = "tma" if config.tma else "ptr"
    return f"{config.block_n}x{config.block_v}x{config.block_d}-w{config.num_warps}-s{config.num_stages}-{loads}"


def tile_cases(arch: str, *, every_option: bool = True, shape: Shape = TABLE_SHAPE) -> list[Case]:
    """Every shipped configuration of the tile kernels, with every set of options that compiles to a kernel of its own.

    Without `every_option` only the heaviest set of each, and float16 is left to bfloat16, whose kernels are alike.
    """
    cases: list[Case] = []
    for kernel, by_dtype in table_entries(arch).items():
        for dtype, entries in by_dtype.items():
            if dtype == "float16" and not every_option:
                continue
            for bounds, config in entries:
                for options in _option_sets(kernel, bounds, every_option):
                    name = "-".join([kernel, *(option for option, wanted in options.items() if wanted)])
                    make = _product_launch if kernel in PRODUCTS else _tile_launch
                    cases.append(Case(name, dtype, make(kernel, DTYPES[dtype], config, shape, **options), config))
    return cases


def _option_sets(kernel: str, bounds: dict[str, int], every_option: bool) -> list[dict[str, bool]]:
    if kernel in PRODUCTS:
        return [{"unaligned": not bounds.get("aligned", True), "later": later} for later in (False, True)][
            0 if every_option else 1 :
        ]
    # Without a bound a configuration serves both.
    shifts = [False, True] if kernel == "linear_exps" else [False]
    token_stats = [False] if kernel in ("slice_grad", "filtered_grad") else [False, True]
    unaligned = not bounds.get("aligned", True)
    heavy = bounds.get("heavy")
    # A softcap comes with a scale of its own.
    heads = ({"softcap": False, "scale": False}, {"softcap": False, "scale": True}, {"softcap": True, "scale": False})
    sets = [
        {**head, "unaligned": unaligned, "bias": bias, "shift": shift, "stats": stats}
        for head in heads
        for bias in (False, True)
        for shift in shifts
        for stats in token_stats
        if heavy is None or heavy == (head["softcap"] or stats)
    ]
    return sets if every_option else sets[-1:]


def other_cases(*, every_option: bool = True) -> list[Case]:
    """Kernels without a table entry: those without a product, and what the frozen head puts around its products."""
    cases = []
    for dtype in DTYPES if every_option else ("bfloat16",):
        cases.append(Case("softmax_grad", dtype, _softmax_grad_launch(DTYPES[dtype])))
        cases.append(Case("frozen_head", dtype, _frozen_launch(DTYPES[dtype])))
        cases.append(Case("filter", dtype, _filter_launch(DTYPES[dtype])))
        cases.append(Case("scale", dtype, functools.partial(_scale, DTYPES[dtype])))
    cases.append(Case("bfloat16_weights", "float32", _weights_launch))
    names = paired_loss.KERNEL_LOSSES if every_option else ("sigmoid", "nca_pair", "orpo")
    cases += [Case(f"paired_loss-{name}", "float32", _pair_launch(name)) for name in names]
    divergences = F_DIVERGENCES[1:] if every_option else ("alpha_divergence",)
    cases += [Case(f"paired_loss-sigmoid-{name}", "float32", _pair_launch("sigmoid", name)) for name in divergences]
    return cases


def _tile_launch(
    kernel: str,
    dtype: torch.dtype,
    config: TileConfig,
    shape: Shape,
    *,
    softcap: bool,
    scale: bool,
    unaligned: bool,
    bias: bool,
    shift: bool,
    stats: bool,
) -> Callable[[], Any]:
    N, D, V = shape

    def launch() -> None:
        # Loads by pointers take other D than multiples of 16 one by one, as they do rows that are not aligned.
        features = D - 1 if unaligned else D if config.tma else D // 16 * 16
        hidden, weight = _meta(N, features, dtype=dtype), _meta(V, features, dtype=dtype)
        labels, row = _meta(N, dtype=torch.int64), _meta(N)
        bias_V = _meta(V, dtype=dtype) if bias else None
        head = Head(weight, bias_V, softcap=30.0 if softcap else None, temperature=0.7 if scale or softcap else 1.0)
        common: dict[str, Any] = {"first_col": 0, "config": config}
        if kernel in ("slice_grad", "filtered_grad"):
            out, lse = tile_logps.empty_exps(hidden, V), _meta(N, dtype=torch.float64)
            lists = _tile_lists(shape) if kernel == "filtered_grad" else None
            slice_grad.slice_grad(hidden, head, labels, lse, row, out, ignore_index=-100, lists=lists, **common)
            return
        exps = tile_logps.empty_exps(hidden, V) if kernel == "linear_exps" else None
        tile_logps.tile_partials(
            hidden, head, labels, row, exps=exps, row_shift_T=row if shift else None, token_stats=stats, **common
        )

    return launch


def _tile_lists(shape: Shape = TABLE_SHAPE) -> filtered_products.TileLists:
    N, _, V = shape
    kept = _meta(-(-N // 128), -(-V // 128), dtype=torch.bool)
    return filtered_products.TileLists.make(kept, rows=128, columns=128)


def _product_launch(
    kernel: str, dtype: torch.dtype, config: TileConfig, shape: Shape, *, unaligned: bool, later: bool
) -> Callable[[], Any]:
    """`later`: on top of what an earlier slice, or an earlier backward, has left."""
    N, D, V = shape

    def launch() -> None:
        features = D - 1 if unaligned else D // 16 * 16
        hidden, weight = _meta(N, features, dtype=dtype), _meta(V, features, dtype=dtype)
        grad, lists = tile_logps.empty_exps(hidden, V)[:N, :V], _tile_lists(shape)
        if kernel == "filtered_dx":
            first_col = 128 if later else 0
            dX = _meta(N, features)
            filtered_products.add_filtered_dx_(dX, grad, weight, lists, first_col=first_col, config=config)
        else:
            out = _meta(V, features) if later else weight
            filtered_products.filtered_dw(out, grad, hidden, lists, first_col=0, accumulate=later, config=config)

    return launch


def _filter_launch(dtype: torch.dtype) -> Callable[[], Any]:
    """What a filter needs around its products."""
    N, _, V = TABLE_SHAPE

    def launch() -> None:
        partials, lse = _meta(-(-V // 64), N), _meta(N, dtype=torch.float64)
        tile_mass.tile_mass(partials, partials, lse, width=64, columns=128, V=V)
        filtered_products.filtered_db(_meta(V, dtype=dtype), _meta(N, V, dtype=dtype), _tile_lists(), first_col=0)

    return launch


def _scale(dtype: torch.dtype) -> None:
    scale.scale_(_meta(TABLE_SHAPE.V, TABLE_SHAPE.D, dtype=dtype), torch.empty((), device="meta"))


def _weights_launch() -> None:
    values = _meta(TABLE_SHAPE.V, TABLE_SHAPE.D)
    upper, rest = (_meta(*values.shape, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    bfloat16_weights.stochastic_round(upper, values, key=1 << 31, start=1 << 40, turned=1, rounds=ROUNDS)
    bfloat16_weights.split(upper, rest, values)
    bfloat16_weights.join(values, upper, rest)


def _softmax_grad_launch(dtype: torch.dtype) -> Callable[[], Any]:
    N, _, V = TABLE_SHAPE

    def launch() -> None:
        row, labels = _meta(N), _meta(N, dtype=torch.int64)
        stats = tile_logps.RowScores(row, _meta(N, dtype=torch.float64), row, _meta(-(-V // 128), N), 128)
        head = Head(_meta(V, 64, dtype=dtype), softcap=30.0)
        softmax_grad.softmax_grad_(_meta(N, V, dtype=dtype), row, head, labels, stats, ignore_index=-100)

    return launch


def _frozen_launch(dtype: torch.dtype) -> Callable[[], Any]:
    config = TileConfig(block_n=64, block_v=64, block_d=32, group_n=8, num_warps=4, num_stages=2)

    def launch() -> None:
        N = TABLE_SHAPE.N
        frozen_head.frozen_head(
            _meta(N, 64, dtype=dtype),
            Head(_meta(1024, 64, dtype=dtype), softcap=30.0),
            _meta(N, dtype=torch.int64),
            slice_columns=512,
            ignore_index=-100,
            token_stats=True,
            config=config,
        )

    return launch


def _pair_launch(name: str, divergence: str = "reverse_kl") -> Callable[[], Any]:
    def launch() -> None:
        pairs = 8
        options = LossOptions(label_smoothing=0.1, f_divergence=F_DIVERGENCES.index(divergence))
        terms = paired_loss.PairTerms(
            names=(name,),
            weights=(1.0,),
            **paired_loss.loss_numbers(options),
            margins_P=_meta(pairs),
            ref_logps_S=_meta(2 * pairs),
            lengths_S=_meta(2 * pairs),
            mean_length=_meta(1),
            scale_P=_meta(pairs),
            cu_S1=_meta(2 * pairs + 1, dtype=torch.int32),
        )
        paired_loss.launch_pairs(_meta(TABLE_SHAPE.N), terms, first_pair=0, num_pairs=pairs, first_row=0)

    return launch


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Row(NamedTuple):
    """The worst over the variants of a kernel in one configuration."""

    arch: str
    kernel: str
    dtype: str
    config: str
    found: list[Resources]

    def cells(self) -> list[str]:
        worst = [max(getattr(r, name) for r in self.found) for name in ("registers", "spilled_bytes", "shared_bytes")]
        instructions = sorted({r.tensor_cores for r in self.found} - {""}) or ["none"]
        instructions += sorted({warning for r in self.found for warning in r.warnings})
        numbers = [str(len(self.found)), str(worst[0]), str(worst[1]), f"{worst[2] / 1024:.1f}"]
        return [self.arch, self.kernel, self.dtype, self.config, *numbers, ", ".join(instructions)]


def rows(arch: str, kernels: Sequence[str]) -> Iterator[Row]:
    """Every kernel and shipped configuration on one chip; of some kernels, if any are named."""
    by_entry: dict[tuple[str, str, str], list[Resources]] = {}
    for case in tile_cases(arch) + other_cases():
        if kernels and case.kernel not in kernels:
            continue
        for found in case.compile(arch):
            kernel, config = found.kernel, f"{found.num_warps} warps"
            if case.config is not None:
                kernel, config = case.kernel, describe_config(case.config)
            elif found.tensor_cores:
                # The tile kernel inside the frozen head is one of the configurations above.
                continue
            by_entry.setdefault((kernel, case.dtype, config), []).append(found)
    for (kernel, dtype, config), variants in by_entry.items():
        yield Row(arch, kernel, dtype, config, variants)


def versions() -> str:
    """What compiled and assembled, in one line."""
    N, D, V = TABLE_SHAPE
    return f"triton {triton.__version__}, {_ptxas_version()}, N={N} D={D} V={V}."


def table_lines(found: Iterable[Sequence[str]]) -> list[str]:
    """The table in Markdown from the cells of its rows."""
    separator = "|---|---|---|---|---:|---:|---:|---:|---|"
    return [_line(COLUMNS), separator, *map(_line, found)]


def read_table(page: str) -> list[list[str]]:
    """The cells of the rows of a page."""
    lines = page.partition(MARKER)[2].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]


def update(page: str, found: Sequence[Sequence[str]], info: str) -> str:
    """The page with `found` in place of the rows of the same chips and kernels; both keep their order."""
    new, before = {tuple(cells[:2]) for cells in found}, read_table(page)
    kept = [cells for cells in before if tuple(cells[:2]) not in new]
    kernels = list(dict.fromkeys(cells[1] for cells in [*before, *found]))
    ordered = sorted([*kept, *found], key=lambda cells: (_capability(cells[0]), kernels.index(cells[1])))
    return "\n".join([page.partition(MARKER)[0] + MARKER, "", info, "", *table_lines(ordered)]) + "\n"


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ptxas_version() -> str:
    """Triton brings one assembler for older chips and one for newer ones."""
    versions = {}
    for capability in (80, 90):
        command = [get_ptxas(capability).path, "--version"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"release [\d.]+, V([\d.]+)", report)
        assert found, report
        versions[found[1]] = None
    return f"ptxas {' and '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", choices=sorted(SHARED_MEMORY), action="append", help="chip; by default all with a table"
    )
    parser.add_argument("--kernel", action="append", default=[], help="of a tile table, or a case; by default all")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="page whose table to update")
    args = parser.parse_args()
    if args.update and MARKER not in args.update.read_text():
        sys.exit(f"error: {args.update} has no line {MARKER}")
    print(f"{versions()}\n\n" + "\n".join(table_lines([])), flush=True)
    for arch in args.arch or shipped_archs():
        found = [row.cells() for row in rows(arch, args.kernel)]
        print("\n".join(map(_line, found)), flush=True)
        if args.update:
            args.update.write_text(update(args.update.read_text(), found, versions()))


if __name__ == "__main__":
    main()
