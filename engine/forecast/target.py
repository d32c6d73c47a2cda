"""What a forecast is for: a kind of device, present or not, and how many of them share a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .. import distributed
from ..config.schema import RunConfig
from ..errors import UserError
from ..model import resolve_device
from ..model.attention import Backend, choose_backend
from ..model.load import DTYPES

DeviceKind = Literal["cuda", "cpu"]
GIB = 2**30
_GAPS = 0.05
"""Of what is allocated: room between blocks, which segments that grow leave few of."""
_LIBRARIES, _NCCL = 0.7 * GIB, 0.8 * GIB
"""CUDA context with its kernels and cuBLAS workspace; buffers of NCCL, with several processes."""


@dataclass(frozen=True)
class Target:
    """One of the devices of a run."""

    device: torch.device
    """Where tensors without data lie while shapes are run: torch has no tensors, not even such, of a device that it was
    not built for, so those of an absent CUDA device lie on the CPU."""
    kind: DeviceKind
    processes: int = 1

    @classmethod
    def here(cls) -> Target:
        """What a run that is started now takes."""
        return cls.on(resolve_device())

    @classmethod
    def on(cls, device: torch.device) -> Target:
        """A device that is there, in a run of as many processes as this one."""
        return cls(device, "cuda" if device.type == "cuda" else "cpu", distributed.size())

    @classmethod
    def of_kind(cls, kind: str | None, processes: int) -> Target:
        """A device of a kind, here or elsewhere; of no kind, what is here."""
        here = resolve_device()
        on: DeviceKind = "cuda" if (kind or here.type) == "cuda" else "cpu"
        return cls(here if here.type == on else torch.device("cpu"), on, processes)

    @property
    def absent(self) -> bool:
        """Whether it is a CUDA device and this machine has none."""
        return self.kind != self.device.type

    def backend(self, config: RunConfig) -> Backend:
        """How attention is computed there.

        Of an absent device it is the variable-length FlashAttention 2 that torch has, which holds what the others hold,
        and FlexAttention for layers that this cannot compute.

        Raises:
            UserError: the backend that is asked for does not run there.
        """
        asked, dtype = config.model.attention, DTYPES[config.model.dtype]
        if not self.absent or asked == "sdpa":
            return choose_backend(asked, self.device, dtype)
        if asked == "native":
            raise UserError("model.attention=native runs on the CPU: set model.attention to auto, or forecast for cpu")
        if dtype not in (torch.bfloat16, torch.float16):
            return Backend("sdpa", "kernels are for half precision")
        if asked == "flex":
            return Backend("flex", "")
        reason = "as flash-attn has it" if asked == "flash" else f"in place of {asked}" if asked == "flash3" else ""
        return Backend("varlen", reason, ("flex", "sdpa"))

    def needed(self, peak: int) -> int:
        """Bytes that a process takes of its device, of which torch's allocator counts ``peak``."""
        if self.kind != "cuda":
            return peak
        return int(peak * (1 + _GAPS) + _LIBRARIES + (_NCCL if self.processes > 1 else 0))
