"""Activations in host memory between the forward and the backward pass.

Each storage is copied once, whatever views of it autograd saves. On CUDA the copies run beside the computation, on a
stream of their own: forward, a storage is let go when its copy is done; backward, those that are needed next are on
their way while earlier ones are used. The computation waits for copies by events of the device, the host never.
What lies on the device in both directions is bounded by ``AHEAD_BYTES``, and nothing depends on how fast copies are: a
storage is let go, or waited for, at the same operation in every run.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import saved_tensors_hooks

from ..packing.rows import RowPlan

_CPU = torch.device("cpu")
SMALLEST = 1024
"""Elements below which a copy is not worth its launch."""
AHEAD_BYTES = 1 << 30
"""On their way to the host, or back before they are needed: 20 to 40 ms of a bus, several layers of small models."""
_WHOLE = 2
"""A storage is copied whole, for all views of it, where it is at most so many times as large as the first of them."""


class _Inline:
    """Copies in the stream of the computation, as the CPU has no other."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source)

    def wait(self, event: Any) -> None:
        pass


class _Beside:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = _copy_stream(device)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Once what is computed so far is done; the event tells when the copy is."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """What is computed from here on comes after."""
        torch.cuda.current_stream(self._device).wait_event(event)


class _Shapes(_Inline):
    """No copies, for forecasts of what lies on the device at which time."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        pass


@lru_cache(maxsize=16)
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class _Copy:
    """A storage, flat, and where it is."""

    place: int
    """Its number in the order in which the forward pass saved them."""
    held: Tensor
    """In host memory."""
    device: torch.device
    users: int = 0
    """Saved tensors that have not been asked for."""
    source: Tensor | None = None
    """What was copied, while its copy may be on its way."""
    back: Tensor | None = None
    """On the device again."""
    event: Any = None
    """Of the last copy, in either direction; None once it was waited for."""

    @property
    def nbytes(self) -> int:
        return self.held.nbytes


class _Saved(NamedTuple):
    """A view of a copy."""

    copy: _Copy
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class _Transfers:
    """The copies of a forward pass."""

    host: torch.device
    lane: _Inline | _Beside | None = None
    copies: list[_Copy | None] = field(default_factory=list)
    """In the order of the forward pass; None where all that was saved of one has been used."""
    leaving: deque[_Copy] = field(default_factory=deque)
    known: dict[tuple[int, ...], _Copy] = field(default_factory=dict)
    """By storage and version, of those that exist."""
    next: int | None = None
    """The next one to bring back ahead of its use."""
    moving: int = 0
    """Bytes that are on their way, or back and unused."""

    def lane_of(self, device: torch.device, tensor: Tensor) -> _Inline | _Beside:
        if self.lane is None:
            on_gpu = device.type == "cuda"
            if self.host.type == "meta" or (on_gpu and is_fake(tensor)):
                self.lane = _Shapes()
            else:
                self.lane = _Beside(device) if on_gpu else _Inline()
        return self.lane

    def send(self, flat: Tensor) -> _Copy:
        """Start the copy of a tensor, which is held until the computation has waited for it."""
        lane = self.lane_of(flat.device, flat)
        held = torch.empty(flat.shape, dtype=flat.dtype, device=self.host, pin_memory=flat.device.type == "cuda")
        copy = _Copy(len(self.copies), held, flat.device, source=flat)
        copy.event = lane.copy(held, flat)
        self.copies.append(copy)
        if type(lane) is _Inline:
            copy.source = None
            return copy
        self.leaving.append(copy)
        self.moving += copy.nbytes
        while self.moving > AHEAD_BYTES:
            self._let_go(self.leaving.popleft())
        return copy

    def _let_go(self, copy: _Copy) -> None:
        self._wait(copy)
        copy.source = None
        self.moving -= copy.nbytes

    def _wait(self, copy: _Copy) -> None:
        if copy.event is not None:
            assert self.lane is not None
            self.lane.wait(copy.event)
            copy.event = None

    def use(self, copy: _Copy) -> Tensor:
        """What was sent, on its device."""
        self._bring(copy)
        if self.next is None or self.next >= copy.place:
            self.next = copy.place - 1
        while self.next >= 0 and self.moving < AHEAD_BYTES:
            if (ahead := self.copies[self.next]) is not None:
                self._bring(ahead)
            self.next -= 1
        if copy.source is not None:
            # What did not leave in time is where it was.
            return copy.source
        self._wait(copy)
        assert copy.back is not None
        return copy.back

    def _bring(self, copy: _Copy) -> None:
        if copy.source is not None or copy.back is not None:
            return
        copy.back = torch.empty(copy.held.shape, dtype=copy.held.dtype, device=copy.device)
        copy.event = self.lane_of(copy.device, copy.back).copy(copy.back, copy.held)
        self.moving += copy.nbytes

    def done(self, copy: _Copy) -> None:
        """Let go of what all saved tensors of a copy have been asked for."""
        self._wait(copy)
        copy.source = copy.back = None
        self.copies[copy.place] = None
        self.moving -= copy.nbytes


class OffloadedActivations(saved_tensors_hooks):
    """While it is entered, what autograd saves of the packed tokens is kept in host memory.

    A tensor counts as an activation when one of its dimensions is a number of rows, such as that of packed tokens, or
    when it begins with the rows of a block and is as large; weights and their copies in the compute dtype stay where
    they are. Host memory is page-locked on CUDA; no value and no order of operations changes. On the CPU the copies are
    made all the same.

    Args:
        row_counts: how many rows activations of the forward pass have.
        rows: what of it is computed in rows.
        host: where copies lie; on the meta device nothing is copied, for forecasts of what is left.
    """

    def __init__(self, row_counts: Sequence[int], rows: RowPlan | None = None, host: torch.device = _CPU):
        self.row_counts = frozenset(row_counts)
        self.shapes = () if rows is None else rows.shapes
        self._transfers = _Transfers(host)
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if tensor.numel() < SMALLEST or not self._is_activation(tensor):
            return tensor
        storage, size = tensor.untyped_storage(), tensor.element_size()
        whole = storage.nbytes() <= _WHOLE * tensor.nbytes and storage.nbytes() % size == 0
        shape, stride, offset = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        key: tuple[Any, ...] = (storage._cdata, tensor._version, tensor.dtype)
        if not whole:
            key += (shape, stride, offset)
        copy = self._transfers.known.get(key)
        if copy is None:
            plain = tensor.detach()
            flat = plain.as_strided((storage.nbytes() // size,), (1,), 0) if whole else plain.contiguous()
            copy = self._transfers.known[key] = self._transfers.send(flat)
            weakref.finalize(storage, self._transfers.known.pop, key, None)
        copy.users += 1
        return _Saved(copy, shape, stride, offset) if whole else _Saved(copy, shape, copy.held.stride(), 0)

    def _is_activation(self, tensor: Tensor) -> bool:
        if not self.row_counts.isdisjoint(tensor.shape):
            return True
        # a module that is in rows may put its length anywhere, or cut it into chunks
        return any(
            len(tensor) in (rows, rows * length) and tensor.numel() >= rows * length for rows, length in self.shapes
        )

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        copy, shape, stride, offset = saved
        found = self._transfers.use(copy).as_strided(shape, stride, offset)
        copy.users -= 1
        # Fewer than none where a graph is gone through twice.
        if copy.users <= 0:
            self._transfers.done(copy)
        return found
