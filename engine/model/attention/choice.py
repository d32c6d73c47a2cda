"""Which backend computes attention here: each candidate is imported and called once before it is chosen."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

from dpo_kernels import native as library

from ...errors import UserError, out_of_memory
from ...packing.layout import Segment, plan_attention
from ..sources import first_line
from . import flex, kernels, native, sinks

# What names must not contain: transformers gives a meaning of its own to "flash" and "sdpa".
_SHORT = {"flash3": "fa3", "flash": "fa", "varlen": "varlen", "flex": "flex", "native": "native", "sdpa": "segments"}
_HOPPER = (9, 0)
KERNEL_DEVICES = ("cuda",)
NATIVE_DEVICES = ("cpu",)
_REQUESTED = "requested"


class Kernel(NamedTuple):
    """A library's variable-length kernel and what it can do."""

    attend: kernels.AttendKeys
    head_dim: int
    """The largest head dimension."""
    softcap: bool
    """Whether it caps scores."""
    sinks: sinks.SinkKernel | None
    """The same kernel with sinks, where its log-sum-exp can be had."""


KERNELS = {
    # beyond 192 its backward pass adds with atomics, also when asked for a deterministic one
    "flash3": Kernel(kernels.flash3, head_dim=192, softcap=True, sinks=None),
    "flash": Kernel(kernels.flash, head_dim=256, softcap=True, sinks=sinks.FLASH_SINKS),
    "varlen": Kernel(kernels.varlen, head_dim=256, softcap=False, sinks=sinks.VARLEN_SINKS),
}
"""Kernels for CUDA devices, in order of preference."""
NAMES = (*KERNELS, "flex", "native", "sdpa")
"""All backends in order of preference; ``flex`` is for CUDA, ``native`` for the CPU, ``sdpa`` runs anywhere."""


class Backend(NamedTuple):
    """The chosen way to compute attention, and why."""

    name: str
    reason: str
    others: tuple[str, ...] = ()
    """What computes layers that it cannot, in order of preference; nothing when it was asked for by name."""

    @property
    def asked_for(self) -> bool:
        """Whether the user named it."""
        return self.reason == _REQUESTED

    @property
    def implementation(self) -> str:
        """The name under which transformers knows it."""
        return implementation_name((self.name, *self.others))


def implementation_name(names: tuple[str, ...]) -> str:
    """The name under which transformers knows these backends, of which the first that can computes a layer."""
    return "_".join(["dpo_packed", *(_SHORT.get(name, name) for name in names)])


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Choose the attention backend once, for a device and a compute dtype.

    Args:
        requested: ``auto``, or one of ``NAMES``; an explicit request never falls back, for no layer.

    Raises:
        UserError: the requested backend cannot run here.
    """
    if requested == "sdpa":
        return Backend("sdpa", _REQUESTED)
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype):
            raise UserError(f"model.attention={requested} cannot run here: {obstacle}; set model.attention to auto")
        return Backend(requested, _REQUESTED)
    obstacles = {name: _obstacle(name, device, dtype) for name in (*KERNELS, "flex")}
    if device.type in NATIVE_DEVICES:
        slow = "it has no vector instructions for this processor"
        obstacles["native"] = _native_obstacle(device, dtype) or (slow if library.isa() == "plain" else None)
    first, *others = [*(name for name, obstacle in obstacles.items() if obstacle is None), "sdpa"]
    groups: dict[str, list[str]] = {}
    for name, obstacle in obstacles.items():
        if obstacle is None:
            break
        groups.setdefault(obstacle, []).append(name)
    passed_over = [f"{', '.join(names)}: {obstacle}" for obstacle, names in groups.items()]
    reason = "passed over " + "; ".join(passed_over) if passed_over else "first choice"
    return Backend(first, reason, tuple(others))


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on a device in a compute dtype, or None."""
    if name == "native":
        return _native_obstacle(device, dtype)
    if device.type not in KERNEL_DEVICES:
        return f"a CUDA device is needed, and this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 or float16 is needed, and the compute dtype is {str(dtype).removeprefix('torch.')}"
    if name == "flex":
        # compiling takes longer than most runs would gain: it is tried when a layer needs it
        return flex.obstacle(device)
    return _probe(name, device, dtype)


def _native_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in NATIVE_DEVICES:
        return f"a CPU is needed, and this is {device.type}"
    if dtype not in native.DTYPES:
        return f"it does not compute in {str(dtype).removeprefix('torch.')}"
    return library.why_not()


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=32)
def _probe(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Import a kernel and run it forward and backward on a handful of tokens; what went wrong, or None."""
    if name == "flash3" and _capability(device) != _HOPPER:
        return "it is for Hopper (compute capability 9.0)"
    try:
        if missing := _missing(name):
            return missing
        plan = plan_attention([Segment(0, 3, 0, 0), Segment(3, 5, 0, 2)])
        plan = plan.map_tensors(lambda tensor: tensor.to(device))
        query = torch.ones(5, 2, 64, device=device, dtype=dtype, requires_grad=True)
        key = torch.ones(7, 1, 64, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            KERNELS[name].attend(query, key, key, plan, scaling=0.125, window=None).sum().backward()
        if device.type == "cuda":
            # what fails on the device is known only then
            torch.cuda.synchronize(device)
    except (ImportError, OSError) as error:
        return f"it is installed but does not import: {first_line(error)}"
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError) as error:
        if out_of_memory(error) is not None:
            raise
        return f"it fails here: {type(error).__name__}: {first_line(error)}"
    return None


def _missing(name: str) -> str | None:
    """What is not installed of what a kernel needs, or None."""
    if name == "varlen":
        if find_spec("torch.nn.attention.varlen") is None or "window_size" not in kernels.varlen_parameters():
            return f"torch {torch.__version__} has no variable-length attention with windows"
        return None
    module = {"flash3": "flash_attn_interface", "flash": "flash_attn"}[name]
    spec = find_spec(module)
    if spec is None:
        package = {
            "flash3": "FlashAttention 3 is not installed",
            "flash": "flash-attn is not installed (pip install --no-build-isolation dpo-kernels[flash])",
        }
        return package[name]
    if spec.origin is None:
        return f"the folder {module} is there, but not flash-attn 2: flash-attn-4 alone has no such functions"
    return None
