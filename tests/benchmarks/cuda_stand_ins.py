"""Sections of ``benchmarks.gpu`` on a device that says it is CUDA and computes on the CPU.

What only runs on a GPU (events, streams, graphs, memory figures, synchronisation modes) is called here with stand-ins
that take what torch's own functions take. Tensors that ask for the device lie on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from benchmarks.gpu_sections import SECTIONS as REAL
from benchmarks.gpu_table import Check, Context, Section

# Made before the mode below, which also moves what is made of names.
CUDA = torch.device("cuda")
PROPERTIES = SimpleNamespace(name="stand-in", total_memory=2**40, multi_processor_count=132, major=9, minor=0)
RETURNS: dict[str, Any] = {
    "synchronize": None,
    "set_sync_debug_mode": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "mem_get_info": (2**40, 2**40),
    "device_count": 2,
    "get_device_properties": PROPERTIES,
    "get_device_name": "stand-in",
    "current_stream": mock.Mock(spec=torch.cuda.Stream),
    "_sleep": None,
}


class OnCPUMode(TorchFunctionMode):
    """Puts on the CPU what asks for a CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(value: Any) -> Any:
            is_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return torch.device("cpu") if is_device else value

        named = {name: moved(value) for name, value in (kwargs or {}).items()}
        return func(*(moved(value) for value in args), **named)


class Event:
    """Of ``torch.cuda.Event``, what is called."""

    def __init__(self, enable_timing: bool = False):
        assert enable_timing

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Event) -> float:
        return 1.0


class OnCPUGenerator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> OnCPUGenerator:
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def _inside(*args: Any, **kwargs: Any) -> Any:
    yield


def install(context: Context) -> None:
    """Until the process ends."""
    context.__dict__["device"] = CUDA
    if torch.cuda.Event is Event:
        return
    for name, value in RETURNS.items():
        setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name), return_value=value))
    for name in ("Stream", "CUDAGraph"):
        setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name), spec_set=True))
    torch.cuda.Event = Event  # type: ignore[misc, assignment]
    torch.cuda.stream = mock.create_autospec(torch.cuda.stream, side_effect=_inside)  # type: ignore[assignment]
    torch.cuda.graph = mock.create_autospec(torch.cuda.graph, side_effect=_inside)  # type: ignore[misc, assignment]
    torch.Generator = OnCPUGenerator  # type: ignore[misc]
    OnCPUMode().__enter__()


def _standing_in(section: Section, only: tuple[str, ...]) -> Callable[[Context], list[Check]]:
    """Checks whose names end with one of ``only``."""

    def checks(context: Context) -> list[Check]:
        install(context)
        return [check for check in section.checks(context) if check.name.endswith(only)]

    return checks


OF_INTEREST = {
    "environment": ("",),
    "cuda": ("no wait for the device: loss", "capture: loss", "stream: statistics", "second device: frozen head"),
    "sizes": ("elements",),
    "profile": ("filtered",),
    "shapes": ("loss",),
}
SECTIONS = {
    name: Section(REAL[name].title, _standing_in(REAL[name], only), 0, 100) for name, only in OF_INTEREST.items()
}
