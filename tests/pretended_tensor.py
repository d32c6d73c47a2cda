"""Tensors of the pretended device (``tests/pretended_cuda.py``), and the error of a host that would wait for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
ENTERED: list[Any] = []
"""Each ``PretendedCuda`` that code runs under."""


class HostWaitError(RuntimeError):
    """The host would wait for the device."""


def wait(reason: str) -> None:
    """The host waits: an error, unless it may."""
    for device in ENTERED:
        if device.may_wait:
            device.waits += 1
            device.finish()
            return
    raise HostWaitError(reason)


class OnDevice(torch.Tensor):
    """A tensor of the pretended device. To torch's C++ side it lies on the CPU."""

    data_on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> OnDevice:
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, data.size(), device=torch.device("cpu"), **layout)
        self.data_on_host = data
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("copy", None)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            wait(f"a tensor of shape {list(self.shape)} is copied to the CPU")
            return self.data_on_host.detach().to(dtype or self.dtype)
        return self if dtype in (None, self.dtype) else torch.Tensor.to(self, dtype)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def tolist(self) -> list:
        wait(f"a tensor of shape {list(self.shape)} is read as a list")
        return self.data_on_host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on a GPU has no numpy array")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.data_on_host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_on_host.untyped_storage()

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the pretended device, outside of PretendedCuda")


def on_host(value: Any) -> Any:
    """The data of a tensor of the device, for tests that look at results; other values as they are."""
    return value.data_on_host if isinstance(value, OnDevice) else value
