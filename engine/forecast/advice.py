"""What a run that is short of memory is told: the forecast beside what the device has."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from .. import distributed
from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..memory_errors import remedies
from ..packing import plan_first_epoch
from .layout import find_layout
from .memory import Memory, forecast_memory
from .resident import resident_bytes
from .target import GIB, Target

log = logging.getLogger(__name__)


def forecast_run(config: RunConfig, dataset: PreferenceDataset, target: Target) -> Memory | None:
    """The forecast of ``dpo plan``; None for a model that does not run on shapes alone."""
    try:
        # One of several processes may be the only one that has run out of memory.
        with distributed.alone():
            found = find_layout(config, target.device)
            resident = resident_bytes(config, target.device) if target.kind == "cpu" else 0
            config = replace(config, packing=found.packing)
            steps = plan_first_epoch(dataset, config)
            return forecast_memory(config, dataset, steps, target=target, resident=resident, layout=found.layout)
    except Exception as error:
        log.debug("no forecast of memory: %s", error)
        return None


def capacity(device: torch.device) -> int:
    """Bytes of memory that the device, or this machine, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [psutil.virtual_memory().total]
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.exists() and (text := cgroup.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


def figures(memory: Memory, target: Target) -> str:
    """The forecast in words."""
    parts = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        (f"activations of {memory.pack_tokens:,} tokens", memory.activations),
    )
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    each = f" in each of {target.processes} processes" if target.processes > 1 else ""
    has = f"{'the device' if target.kind == 'cuda' else 'this machine'} has {capacity(target.device) / GIB:.1f} GiB"
    return f"forecast {target.needed(memory.peak) / GIB:.1f} GiB{each} ({listed}), {has}"


def advise(config: RunConfig, memory: Memory, target: Target) -> None:
    """Say before the first step what a run needs, and what to do where the device has less."""
    if target.needed(memory.peak) > capacity(target.device):
        log.info("memory: %s: it may not fit; %s", figures(memory, target), remedies(config))
    else:
        log.info("memory: %s", figures(memory, target))


@dataclass
class KnownRun:
    """What can be said of the memory of a run of ``config`` by the time it runs out."""

    config: RunConfig
    memory: Memory | None = None
    datasets: dict[str, PreferenceDataset] = field(default_factory=dict)
    target: Target | None = None

    def take(self, datasets: dict[str, PreferenceDataset], device: torch.device) -> None:
        """Note the data of the run; on a CUDA device, say what the run needs of it."""
        self.datasets, self.target = datasets, Target.on(device)
        memory = self.forecast() if device.type == "cuda" else None
        if memory is not None:
            advise(self.config, memory, self.target)

    def forecast(self) -> Memory | None:
        """The forecast, once there is data to make it of."""
        if self.memory is None and self.target is not None and "train" in self.datasets:
            self.memory = forecast_run(self.config, self.datasets["train"], self.target)
        return self.memory

    def told(self) -> str:
        """The figures of the forecast, once there is one."""
        memory = self.forecast()
        return "" if memory is None or self.target is None else figures(memory, self.target)
