"""Tensors that wait in the memory of the host, page-locked where the device is a GPU.

Copies run on the stream of the computation, from and to page-locked memory, so nobody waits for them, and no value and
no order of operations changes. On the CPU they are made all the same.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..mesh import shard_mesh

SMALLEST = 1024
"""Elements below which a copy is not worth its launch."""
EXACT = 1 << 20
"""Bytes from which page-locked memory is taken to the byte: torch's allocator of it takes the next power of two."""

log = logging.getLogger(__name__)


def empty_rows(like: Tensor, dtype: torch.dtype, shape: Sequence[int], *, on_host: bool, pinned: bool = True) -> Tensor:
    """A tensor with as many rows as ``like``, sharded as that is.

    Args:
        on_host: in host memory, where it is not small.
        pinned: page-locked there.
    """
    local = distributed.local_tensor(like)
    host = on_host and math.prod(shape) >= SMALLEST
    pin = host and pinned and local.device.type == "cuda"
    sizes = (*local.shape[:1], *shape[1:])
    if pin:
        return sharded_rows(like, empty_page_locked(sizes, dtype))
    own = torch.empty(sizes, dtype=dtype, device=torch.device("cpu") if host else local.device)
    return sharded_rows(like, own)


def empty_page_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in host memory that a GPU reads and writes without the host.

    A large one takes its bytes and no more, and gives them back to the system when nobody has it any more.
    """
    held = torch.empty(shape, dtype=dtype, device="cpu")
    if held.nbytes < EXACT:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    try:
        lock_pages(held.untyped_storage())
    except RuntimeError as error:
        log.warning("%d bytes of host memory stay pageable, so the host waits for their copies: %s", held.nbytes, error)
    return held


def lock_pages(storage: torch.UntypedStorage) -> None:
    """Keep the pages of a storage in memory as long as it is there.

    Raises:
        RuntimeError: the system does not let them be locked.
    """
    from torch.cuda._pin_memory_utils import pin_memory

    pin_memory(storage.data_ptr(), storage.nbytes())
    # CUDA may be gone when the process ends
    weakref.finalize(storage, _unlock, storage.data_ptr()).atexit = False


def _unlock(address: int) -> None:
    from torch.cuda._pin_memory_utils import unpin_memory

    # no copy may be under way
    torch.cuda.synchronize()
    unpin_memory(address)


def sharded_rows(like: Any, local: Any) -> Any:
    """The rows that this process has of a tensor, as a part of the whole, which is sharded as ``like`` is.

    What has no rows, or is not sharded, stays as it is.
    """
    if not (hasattr(like, "device_mesh") and isinstance(local, Tensor) and local.ndim):
        return local
    from torch.distributed.tensor import DTensor

    mesh, shape = like.device_mesh, torch.Size((like.shape[0], *local.shape[1:]))
    mesh = mesh if local.device.type == mesh.device_type else _mesh_on_host(mesh)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=shape, stride=stride)


def empty_on_host(like: Tensor) -> Tensor:
    """A tensor on the host of the shape and dtype of ``like``, sharded as that is."""
    local = distributed.local_tensor(like)
    on_gpu = local.device.type == "cuda"
    held = empty_page_locked(local.shape, local.dtype) if on_gpu else torch.empty_like(local, device="cpu")
    return _sharded_as(like, held, _mesh_on_host(like.device_mesh)) if hasattr(like, "device_mesh") else held


def page_locked(held: Tensor, device: torch.device) -> Tensor:
    """``held``, on the host, as a device takes it without anybody waiting: read from a file it is pageable."""
    if device.type != "cuda" or distributed.local_tensor(held).is_pinned():
        return held
    return empty_page_locked(held.shape, held.dtype).copy_(held)


def to_host(tensor: Tensor, held: Tensor | None) -> Tensor:
    """A copy of ``tensor`` on the host: in ``held``, where that is given."""
    held = empty_on_host(tensor) if held is None else held
    distributed.local_tensor(held).copy_(distributed.local_tensor(tensor), non_blocking=True)
    return held


def to_device(held: Tensor, device: torch.device, mesh: Any) -> Tensor:
    """A copy of ``held`` on a device; of one that is sharded, on the devices of ``mesh``."""
    local = distributed.local_tensor(held)
    copy = torch.empty(local.shape, dtype=local.dtype, device=device)
    copy.copy_(local, non_blocking=True)
    return _sharded_as(held, copy, mesh) if hasattr(held, "device_mesh") else copy


def _sharded_as(tensor: Any, local: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(local, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def _mesh_on_host(mesh: Any) -> Any:
    """The same processes, for tensors on their hosts. Every rank must ask at the same time, the first time."""
    return mesh if mesh.device_type == "cpu" else shard_mesh("cpu")
