"""The search: compile, check, time in turn, keep the best."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from dpo_kernels.kernels.launch import INTERPRETING
from dpo_kernels.kernels.offline import SHARED_MEMORY
from dpo_kernels.kernels.tile_config import TileConfig, device_arch, dtype_name
from dpo_kernels.tuning.candidates import candidates, neighbours, prune
from dpo_kernels.tuning.errors import TuningError
from dpo_kernels.tuning.problems import Problem, Workload

SHORT_ROUNDS, LONG_ROUNDS, FINALISTS = 3, 12, 5
LEAST_GAIN = 0.01
"""Share of the time below which a difference is taken for noise and the shipped configuration stays."""
LARGEST_ERROR = 1e-3
"""Of log-probs and other sums, in nats."""

Times = dict[TileConfig, list[list[float]]]
"""Configuration -> problem of the group -> milliseconds of each round."""


@dataclass
class Result:
    """What was found for the problems of one bucket."""

    group: list[Problem]
    shipped: list[TileConfig]
    best: TileConfig
    """The fastest over all problems, or the first shipped one where none is faster."""
    tuned: bool
    shipped_ms: list[float]
    best_ms: list[float]
    tried: int
    flaws: dict[str, int]
    wrong: list[str] = field(default_factory=list)
    """Configurations that computed other numbers than the shipped one."""

    def line(self) -> str:
        problem = self.group[0]
        told = [f"{count} {reason}" for reason, count in sorted(self.flaws.items())]
        told += [f"WRONG NUMBERS: {text}" for text in self.wrong]
        sizes = ", ".join(f"N={p.T} D={p.D} V={p.V}" for p in self.group)
        left_out = f" ({'; '.join(told)})" if told else ""
        return f"{problem.kernel} {dtype_name(problem.dtype)} {sizes}: {self.tried} timed{left_out}"

    def table_rows(self) -> list[str]:
        tile = describe_tile(self.best) if self.tuned else "as shipped"
        if INTERPRETING:
            # The interpreter's times say nothing of a GPU.
            return [f"| {p.kernel} | {p.D} | {p.V} | - | - | - | {tile} |" for p in self.group]
        return [
            f"| {p.kernel} | {p.D} | {p.V} | {before:.3f} | {after:.3f} | {before / after:.2f}x | {tile} |"
            for p, before, after in zip(self.group, self.shipped_ms, self.best_ms, strict=True)
        ]

    def measured(self) -> dict[str, Any]:
        """For people who read the table."""
        times = zip(self.group, self.shipped_ms, self.best_ms, strict=True)
        return {
            "device": machine_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "ms": [{"N": p.T, "D": p.D, "V": p.V, "shipped": before, "best": after} for p, before, after in times],
        }


def machine_name() -> str:
    return "the interpreter" if INTERPRETING else torch.cuda.get_device_name()


def describe_tile(config: TileConfig) -> str:
    loads = "descriptors" if config.tma else "pointers"
    sizes = f"{config.block_n}x{config.block_v}x{config.block_d}"
    return f"{sizes}, groups of {config.group_n}, {config.num_warps} warps, {config.num_stages} stages, {loads}"


class Search:
    """The device, and how often things are timed on it."""

    def __init__(self, device: torch.device, *, dry_run: bool):
        self.device = device
        self.arch = device_arch(device)
        if self.arch != "cpu" and self.arch not in SHARED_MEMORY:
            known = ", ".join(SHARED_MEMORY)
            raise TuningError(f"the shared memory of {self.arch} is not known here; chips that can be tuned: {known}")
        self.short, self.long = (1, 1) if dry_run else (SHORT_ROUNDS, LONG_ROUNDS)
        self.machine = f"{machine_name()} ({self.arch}), torch {torch.__version__}, triton {triton.__version__}"

    def tune(self, group: list[Problem]) -> Result:
        """The best configuration for the problems of one bucket."""
        shipped = [problem.shipped(self.arch) for problem in group]
        workloads = [Workload(problem, self.device) for problem in group]
        times: Times = {config: [[] for _ in group] for config in shipped}
        flaws: dict[str, int] = {}
        wrong: list[str] = []
        grid = [config for config in candidates(group[0], self.arch) if config not in times]
        self._admit(grid, workloads, shipped, times, flaws, wrong)
        self._time(list(times), workloads, times, self.short)
        ranked = sorted(times, key=lambda config: _ratio(times, config, shipped))
        before = set(times)
        self._admit(neighbours(ranked[0]), workloads, shipped, times, flaws, wrong)
        finalists = list(dict.fromkeys([*shipped, *ranked[:FINALISTS], *(c for c in times if c not in before)]))
        for config in finalists:
            times[config] = [[] for _ in group]
        self._time(finalists, workloads, times, self.long)
        best = min(finalists, key=lambda config: _ratio(times, config, shipped))
        tuned = best not in shipped and _ratio(times, best, shipped) < 1 - LEAST_GAIN
        shipped_ms = [statistics.median(times[config][i]) for i, config in enumerate(shipped)]
        best_ms = [statistics.median(ms) for ms in times[best]] if tuned else shipped_ms
        chosen = best if tuned else shipped[0]
        return Result(group, shipped, chosen, tuned, shipped_ms, best_ms, len(times), flaws, wrong)

    def _admit(
        self,
        configs: list[TileConfig],
        workloads: list[Workload],
        shipped: list[TileConfig],
        times: Times,
        flaws: dict[str, int],
        wrong: list[str],
    ) -> None:
        """Add to `times` what compiles well and computes what the shipped configuration computes."""
        if not INTERPRETING:
            configs, found = prune(workloads[0].problem, configs, self.arch)
            for reason, count in found.items():
                flaws[reason] = flaws.get(reason, 0) + count
        for workload, default in zip(workloads, shipped, strict=True):
            expected = [tensor.clone() for tensor in workload.result(default)]
            if not all(bool(tensor.isfinite().all()) for tensor in expected):
                raise TuningError(
                    f"the shipped configuration computes no finite numbers: {workload.problem}, {default}"
                )
            for config in configs:
                if not agree(workload.result(config), expected):
                    wrong.append(describe_tile(config))
        times |= {config: [[] for _ in workloads] for config in configs if describe_tile(config) not in wrong}

    def _time(self, configs: list[TileConfig], workloads: list[Workload], times: Times, rounds: int) -> None:
        """A round times every configuration once, so that what drifts on the machine meets all of them alike."""
        for i, workload in enumerate(workloads):
            for number in range(rounds):
                first = number * 7 % len(configs)
                for config in configs[first:] + configs[:first]:
                    times[config][i].append(self._milliseconds(workload, config))

    def _milliseconds(self, workload: Workload, config: TileConfig) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            workload.launch(config)
            return (time.perf_counter() - begin) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        workload.launch(config)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _ratio(times: Times, config: TileConfig, shipped: list[TileConfig]) -> float:
    """Time over that of the shipped configurations: the geometric mean over the problems."""
    logs = [
        math.log(statistics.median(times[config][i]) / statistics.median(times[default][i]))
        for i, default in enumerate(shipped)
    ]
    return math.exp(statistics.fmean(logs))


def agree(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether numbers differ by rounding at most: row statistics in nats, gradients as shares of each element."""
    for ours, theirs in zip(got, expected, strict=True):
        if theirs.dim() == 1:
            relative, absolute = 0.0, LARGEST_ERROR
        else:
            relative, absolute = max(4 * torch.finfo(theirs.dtype).eps, 1e-3), 1e-7
        # By blocks of rows: float32 copies of whole gradients may not fit beside them.
        for a, b in zip(ours.split(256), theirs.split(256), strict=True):
            if not bool(
                ((a.double() if a.dim() == 1 else a.float()) - b).abs().le(relative * b.abs() + absolute).all()
            ):
                return False
    return True
