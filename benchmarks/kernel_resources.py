"""Compile every Triton kernel for chips that need not be here, and print what each takes of them.

    python -m benchmarks.kernel_resources [--arch sm_90] [--markdown]

Launchers run as they are, on meta tensors: a stand-in driver names the chip, and launching stops after compilation. The
PTX then goes through Triton's own ptxas once more, whose report gives registers, spills and warnings.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dpo_kernels.kernels import frozen_head, paired_loss, slice_grad, softmax_grad, tile_logps
from dpo_kernels.kernels.launch import HeadOptions
from dpo_kernels.kernels.tile_config import TileConfig, shipped_archs, table_entries

SHARED_MEMORY = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KiB that one block may use; sm_89 and sm_120 stand for the chips that share the default table."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
N, D, V = 8192, 4096, 128256


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    tensor_cores: str
    """Name of the tensor-core instruction in its PTX, or empty."""
    warnings: tuple[str, ...]


class _OfflineDriver:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, arch: str):
        self.target = GPUTarget("cuda", _capability(arch), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Compiled kernels are kept by device: one per chip, so that chips do not share them.
        return f"offline {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list[Any]]:
    """Launches inside compile for `arch` and do not run; yields the list that the compiled kernels go to."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    previous = driver._active
    JITFunction.run = compile_only
    driver.set_active(_OfflineDriver(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


def inspect_kernel(kernel: Any, arch: str) -> Resources:
    """Assemble the PTX of a compiled kernel and read the assembler's report."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        suffix = "a" if _capability(arch) >= 90 else ""
        command = [get_ptxas(_capability(arch)).path, "-v", f"--gpu-name={arch}{suffix}", str(source)]
        result = subprocess.run([*command, "-o", f"{folder}/out"], capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"ptxas failed for {kernel.metadata.name} on {arch}: {report}")
    spills = re.findall(r"(\d+) bytes spill", report)
    used = re.search(r"Used (\d+) registers", report)
    assert used, report
    instructions = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    return Resources(
        kernel=kernel.metadata.name,
        arch=arch,
        registers=int(used[1]),
        spilled_bytes=sum(map(int, spills)),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        tensor_cores=next((name for name in instructions if name in kernel.asm["ptx"]), ""),
        warnings=tuple(re.findall(r"\(C\d+\)[^\n]*|C75\d\d[^\n]*", report)),
    )


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
    def label(self) -> str:
        return f"{self.name}-{self.dtype}" + ("" if self.config is None else "-" + describe_config(self.config))


def describe_config(config: TileConfig) -> str:
    loads = "tma" if config.tma else "ptr"
    return f"{config.block_n}x{config.block_v}x{config.block_d}-w{config.num_warps}-s{config.num_stages}-{loads}"


def tile_cases(arch: str, *, every_option: bool = True) -> list[Case]:
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
                    cases.append(Case(name, dtype, _tile_launch(kernel, DTYPES[dtype], config, **options), config))
    return cases


def _option_sets(kernel: str, bounds: dict[str, int], every_option: bool) -> list[dict[str, bool]]:
    # Without a bound a configuration serves both.
    shifts = [False, True] if kernel == "linear_exps" else [False]
    token_stats = [False] if kernel == "slice_grad" else [False, True]
    unaligned = not bounds.get("aligned", True)
    heavy = bounds.get("heavy")
    sets = [
        {"softcap": softcap, "unaligned": unaligned, "bias": bias, "shift": shift, "stats": stats}
        for softcap in (False, True)
        for bias in (False, True)
        for shift in shifts
        for stats in token_stats
        if heavy is None or heavy == (softcap or stats)
    ]
    return sets if every_option else sets[-1:]


def other_cases(*, every_option: bool = True) -> list[Case]:
    """Kernels without a table entry: those without a product, and what the frozen head puts around its products."""
    cases = []
    for dtype in DTYPES if every_option else ("bfloat16",):
        cases.append(Case("softmax_grad", dtype, _softmax_grad_launch(DTYPES[dtype])))
        cases.append(Case("frozen_head", dtype, _frozen_launch(DTYPES[dtype])))
    names = paired_loss.KERNEL_LOSSES if every_option else ("sigmoid", "nca_pair", "orpo")
    cases += [Case(f"paired_loss-{name}", "float32", _pair_launch(name)) for name in names]
    return cases


def _tile_launch(
    kernel: str,
    dtype: torch.dtype,
    config: TileConfig,
    *,
    softcap: bool,
    unaligned: bool,
    bias: bool,
    shift: bool,
    stats: bool,
) -> Callable[[], Any]:
    def launch() -> None:
        features = D - 1 if unaligned else D
        hidden, weight = _meta(N, features, dtype=dtype), _meta(V, features, dtype=dtype)
        labels, row = _meta(N, dtype=torch.int64), _meta(N)
        options = HeadOptions(bias_V=_meta(V, dtype=dtype) if bias else None, softcap=30.0 if softcap else None)
        common: dict[str, Any] = {"first_col": 0, "options": options, "config": config}
        if kernel == "slice_grad":
            out = _meta(N, V, dtype=dtype)
            slice_grad.slice_grad(hidden, weight, labels, row, row, out, ignore_index=-100, **common)
            return
        exps = tile_logps.empty_exps(hidden, V) if kernel == "linear_exps" else None
        tile_logps.tile_stats(
            hidden, weight, labels, row, exps=exps, row_shift_N=row if shift else None, token_stats=stats, **common
        )

    return launch


def _softmax_grad_launch(dtype: torch.dtype) -> Callable[[], Any]:
    def launch() -> None:
        row, labels = _meta(N), _meta(N, dtype=torch.int64)
        stats = tile_logps.LinearStats(row, row, _meta(-(-V // 128), N), 128)
        softmax_grad.softmax_grad_(
            _meta(N, V, dtype=dtype), row, labels, stats, V=V, ignore_index=-100, options=HeadOptions(softcap=30.0)
        )

    return launch


def _frozen_launch(dtype: torch.dtype) -> Callable[[], Any]:
    config = TileConfig(block_n=64, block_v=64, block_d=32, group_n=8, num_warps=4, num_stages=2)

    def launch() -> None:
        frozen_head.frozen_head(
            _meta(N, 64, dtype=dtype),
            _meta(1024, 64, dtype=dtype),
            _meta(N, dtype=torch.int64),
            slice_columns=512,
            options=HeadOptions(softcap=30.0),
            ignore_index=-100,
            token_stats=True,
            config=config,
        )

    return launch


def _pair_launch(name: str) -> Callable[[], Any]:
    def launch() -> None:
        pairs = 8
        options = {"beta": 0.1, "label_smoothing": 0.1, "discopop_tau": 0.05, "simpo_gamma": 0.5, "cpo_alpha": 1.0}
        terms = paired_loss.PairTerms(
            names=(name,),
            weights=(1.0,),
            **options,
            per_token_reward=False,
            ref_logps_S=_meta(2 * pairs),
            lengths_S=_meta(2 * pairs),
            mean_length=_meta(1),
            scale_P=_meta(pairs),
            cu_S1=_meta(2 * pairs + 1, dtype=torch.int32),
        )
        paired_loss.launch_pairs(_meta(N), terms, first_pair=0, num_pairs=pairs, first_row=0)

    return launch


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--arch", choices=sorted(SHARED_MEMORY), action="append", help="chip; by default all with a table"
    )
    args = parser.parse_args()
    print(f"Triton {triton.__version__}, N={N} D={D} V={V}\n")
    print("| chip | case | kernel | registers | spilled bytes | shared KiB | warps | tensor cores | warnings |")
    print("|---|---|---|---:|---:|---:|---:|---|---|")
    for arch in args.arch or shipped_archs():
        for case in tile_cases(arch) + other_cases():
            for found in case.compile(arch):
                values = asdict(found)
                shared = f"{found.shared_bytes / 1024:.1f}"
                numbers = [values["registers"], values["spilled_bytes"], shared, values["num_warps"]]
                row = [arch, case.label, found.kernel, *numbers, found.tensor_cores, " ".join(found.warnings)]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
