"""What a run that is short of memory is told: the forecast beside what the device has."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from .. import distributed
from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..memory_errors import remedies
from ..packing import plan_first_epoch
from .memory import Memory, forecast_memory
from .resident import resident_bytes

GIB = 2**30
_GAPS = 0.05
"""Of what is allocated: room between blocks, which segments that grow leave few of."""
_LIBRARIES, _NCCL = 0.7 * GIB, 0.8 * GIB
"""CUDA context with its kernels and cuBLAS workspace; buffers of NCCL, with several processes."""

log = logging.getLogger(__name__)


def forecast_run(config: RunConfig, dataset: PreferenceDataset, device: torch.device) -> Memory | None:
    """The forecast of ``dpo plan``; None for a model that does not run on shapes alone."""
    try:
        # One of several processes may be the only one that has run out of memory.
        with distributed.alone():
            resident = resident_bytes(config, device) if device.type == "cpu" else 0
            steps = plan_first_epoch(dataset, config)
            return forecast_memory(config, dataset, steps, device=device, resident=resident)
    except Exception as error:
        log.debug("no forecast of memory: %s", error)
        return None


def of_each_process(memory: Memory) -> int:
    """Peak bytes of one of the processes of this run: what they share is divided."""
    shared = memory.weights + memory.gradients + memory.optimizer
    return memory.peak - shared + shared // distributed.size()


def needed(memory: Memory, device: torch.device) -> int:
    """Bytes that a process takes of its device, of which torch's allocator counts ``of_each_process``."""
    peak = of_each_process(memory)
    if device.type != "cuda":
        return peak
    return int(peak * (1 + _GAPS) + _LIBRARIES + (_NCCL if distributed.size() > 1 else 0))


def capacity(device: torch.device) -> int:
    """Bytes of memory that the device, or this machine, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [psutil.virtual_memory().total]
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.exists() and (text := cgroup.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


def figures(memory: Memory, device: torch.device) -> str:
    """The forecast in words."""
    parts = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        (f"activations of {memory.pack_tokens:,} tokens", memory.activations),
    )
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    each = f" in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    has = f"{'the device' if device.type == 'cuda' else 'this machine'} has {capacity(device) / GIB:.1f} GiB"
    return f"forecast {needed(memory, device) / GIB:.1f} GiB{each} ({listed}), {has}"


def advise(config: RunConfig, memory: Memory, device: torch.device) -> None:
    """Say before the first step what a run needs, and what to do where the device has less."""
    short = needed(memory, device) > capacity(device)
    if short:
        log.info("memory: %s: it may not fit; %s", figures(memory, device), remedies(config))
    else:
        log.info("memory: %s", figures(memory, device))


@dataclass
class KnownRun:
    """What can be said of the memory of a run of ``config`` by the time it runs out."""

    config: RunConfig
    memory: Memory | None = None
    datasets: dict[str, PreferenceDataset] = field(default_factory=dict)
    device: torch.device | None = None

    def take(self, datasets: dict[str, PreferenceDataset], device: torch.device) -> None:
        """Note the data of the run; on a CUDA device, say what the run needs of it."""
        self.datasets, self.device = datasets, device
        memory = self.forecast() if device.type == "cuda" else None
        if memory is not None:
            advise(self.config, memory, device)

    def forecast(self) -> Memory | None:
        """The forecast, once there is data to make it of."""
        if self.memory is None and self.device is not None and "train" in self.datasets:
            self.memory = forecast_run(self.config, self.datasets["train"], self.device)
        return self.memory

    def told(self) -> str:
        """The figures of the forecast, once there is one."""
        memory = self.forecast()
        return "" if memory is None or self.device is None else figures(memory, self.device)
