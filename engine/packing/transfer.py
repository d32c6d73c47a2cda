"""The tensors of a pack in one buffer, so that one copy takes them to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dpo_kernels.chunks import to_device

_ALIGNMENT = 16
"""Bytes; a multiple of every element size."""


class Movable(Protocol):
    """A record of tensors."""

    def map_tensors(self: M, change: Callable[[Tensor], Tensor]) -> M:
        """The same record with ``change`` of each tensor that belongs on the device, called in a fixed order."""
        ...


M = TypeVar("M", bound=Movable)


def gather(record: M, *, pin: bool) -> M:
    """The same record, its tensors views of one new buffer on the CPU, page-locked or not."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    record.map_tensors(collect)
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pin)
    views = [_view(buffer, end, tensor).copy_(tensor) for end, tensor in zip(ends[:-1], tensors, strict=True)]
    following = iter(views)
    return record.map_tensors(lambda _: next(following))


def send(record: M, device: torch.device) -> M:
    """The same record on ``device``: one copy for each buffer that its tensors lie in, without waiting for it."""
    copies: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copies[storage.data_ptr()] = to_device(source, device)
        return _view(copies[storage.data_ptr()], int(tensor.storage_offset()) * tensor.element_size(), tensor)

    return record.map_tensors(move)


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
