"""CUDA's managed memory and the update kernels of bitsandbytes, for a machine without a GPU.

The Python side of bitsandbytes runs as it is: which state it pages, how it makes, fills, marks and prefetches it, and
what it refuses. Behind its library's functions is memory of the host, and behind its ops, for tensors of the pretended
device, its kernels for the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import bitsandbytes.functional as functional
import torch
from bitsandbytes.backends.cpu import ops as cpu_ops
from torch import Tensor

from tests.pretended_cuda import OnDevice, PretendedCuda, on_host, pretended_cuda


class ManagedMemory:
    """``cget_managed_ptr``, ``cprefetch``, ``cfill_*`` of ``functional.lib``, as bitsandbytes 0.50 calls them."""

    def __init__(self) -> None:
        self.buffers: dict[int, Any] = {}
        self.prefetched: list[int] = []

    def cget_managed_ptr(self, size: ctypes.c_size_t) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        place = ctypes.addressof(buffer)
        self.buffers[place] = buffer
        # Fresh memory has any content.
        ctypes.memset(place, 0xAB, size.value)
        return place

    def cprefetch(self, place: ctypes.c_void_p, size: ctypes.c_size_t, device: ctypes.c_int32) -> None:
        assert place.value in self.buffers, "only what is paged can be prefetched"
        assert (len(self.buffers[place.value]), device.value) == (size.value, 0)
        self.prefetched.append(place.value)

    def cfill_uint8(self, place: ctypes.c_void_p, other: None, value: ctypes.c_uint8, count: ctypes.c_int64) -> None:
        ctypes.memset(place.value, value.value, count.value)

    def cfill_fp32(self, place: ctypes.c_void_p, other: None, value: ctypes.c_float, count: ctypes.c_int64) -> None:
        assert value.value == 0.0
        ctypes.memset(place.value, 0, 4 * count.value)


@contextmanager
def paged_memory() -> Iterator[tuple[PretendedCuda, ManagedMemory]]:
    """A pretended device on which the optimizers of bitsandbytes run."""
    memory = ManagedMemory()

    def kernel(on_cpu: Any) -> Any:
        def update(name: str, *given: Any) -> None:
            # Every kernel of a GPU reads the device of the gradient, and pointers of the rest.
            assert isinstance(given[0], OnDevice)
            with torch.utils._python_dispatch._disable_current_modes():
                on_cpu(name, *map(on_host, given))

        return update

    kernels = {
        "optimizer_update_8bit_blockwise": kernel(cpu_ops._optimizer_update_8bit_blockwise_cpu),
        "optimizer_update_32bit": kernel(cpu_ops._optimizer_update_32bit_cpu),
    }
    manager = functional.GlobalPageManager.get_instance()
    with (
        mock.patch.object(functional, "lib", memory),
        mock.patch.multiple(torch.ops.bitsandbytes, **kernels),
        mock.patch.object(manager, "paged_tensors", []),
        pretended_cuda() as cuda,
        cuda.waiting(),
    ):
        yield cuda, memory


def is_paged(tensor: Tensor) -> bool:
    return getattr(tensor, "is_paged", False)
