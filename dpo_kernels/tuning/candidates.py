"""Tile shapes that are tried, and which of them compile to something that a chip can run well."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from dpo_kernels.kernels.offline import SHARED_MEMORY, compiling_for, inspect_kernel
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.tuning.problems import Problem, Workload

BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (256, 64), (128, 256), (256, 128))
"""Rows and columns of a tile."""
DEPTHS = {2: (32, 64, 128), 4: (16, 32)}
"""Features that are loaded at a time, by the size of an element."""
STAGES = (2, 3, 4, 5)
WARPS = (4, 8)
GROUPS = (4, 8, 16, 32)
MOST_BYTES_IN_FLIGHT = 0.45, 1.0
"""Loads on their way fill at least and at most these shares of the shared memory."""
ACCUMULATORS = 32, 128
"""fp32 sums of a thread: fewer starve the tensor cores, more spill."""
DRY_CANDIDATES = tuple(
    TileConfig(block_n=16, block_v=block_v, block_d=16, group_n=1, num_warps=4, num_stages=1) for block_v in (32, 64)
)


def candidates(problem: Problem, arch: str) -> list[TileConfig]:
    """Tile shapes worth compiling for `problem`: a grid, cut to what fits the chip."""
    if arch == "cpu":
        return list(DRY_CANDIDATES)
    size = problem.dtype.itemsize
    tma = int(arch.removeprefix("sm_")) >= 90 and bool(dict(problem.bounds())["aligned"])
    limit = SHARED_MEMORY[arch] * 1024
    found = []
    for (block_n, block_v), block_d, num_stages, num_warps in itertools.product(BLOCKS, DEPTHS[size], STAGES, WARPS):
        sums = block_n * block_v // (32 * num_warps)
        share = (block_n + block_v) * block_d * size * num_stages / limit
        if not (ACCUMULATORS[0] <= sums <= ACCUMULATORS[1]):
            continue
        if not (MOST_BYTES_IN_FLIGHT[0] <= share <= MOST_BYTES_IN_FLIGHT[1]):
            continue
        found.append(
            TileConfig(
                block_n=block_n,
                block_v=block_v,
                block_d=block_d,
                group_n=8,
                num_warps=num_warps,
                num_stages=num_stages,
                tma=tma,
            )
        )
    return found


def neighbours(config: TileConfig) -> list[TileConfig]:
    """The same tile with other orders of tiles."""
    return [replace(config, group_n=group_n) for group_n in GROUPS if group_n != config.group_n]


def flaw(problem: Problem, config: TileConfig, arch: str) -> str | None:
    """Why `config` is not worth a measurement, from compiling it for `arch` with everything on; None when it is."""
    workload = Workload(problem, torch.device("meta"))
    try:
        with compiling_for(arch) as compiled:
            workload.launch_heaviest(config)
        found = [inspect_kernel(kernel, arch) for kernel in compiled]
    # A compiler may fail on a shape in any way; there are others.
    except Exception as error:
        return f"does not compile ({type(error).__name__})"
    return next((reason for resources in found if (reason := resources.flaw())), None)


def prune(problem: Problem, configs: Sequence[TileConfig], arch: str) -> tuple[list[TileConfig], dict[str, int]]:
    """The configurations without a flaw, and how many had which."""
    kept: list[TileConfig] = []
    flaws: dict[str, int] = {}
    for config in configs:
        reason = flaw(problem, config, arch)
        if reason is None:
            kept.append(config)
        else:
            flaws[reason] = flaws.get(reason, 0) + 1
    return kept, flaws
