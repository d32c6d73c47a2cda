"""Streams of the pretended device: what runs on two of them is in no order but where one waits for the other.

Everything is computed at once, in the order of the host; what a GPU might do otherwise is refused. Each stream has a
clock, and knows up to which time of every other it has waited. An operation that reads or writes a storage which
another stream wrote to later than that, or writes to one that another stream still reads, raises ``UnorderedError``,
and so does, at the end, memory that was given back while another stream than its own might still use it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class UnorderedError(RuntimeError):
    """Two streams use the same memory, and neither waits for the other."""


class Event:
    """A point in a queue: up to which time of each stream all is done there."""

    def __init__(self, streams: Streams, times: dict[Stream, int]) -> None:
        self._streams = streams
        self.times = times

    def synchronize(self) -> None:
        """Have the host wait."""
        self._streams.host_waits()


class Stream:
    """One queue of the device."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.time = 0
        self.seen: dict[Stream, int] = {}

    def knows(self, use: tuple[Stream, int]) -> bool:
        """Whether what another stream did at a time comes before what this one does now."""
        stream, time = use
        return stream is self or self.seen.get(stream, 0) >= time

    def record_event(self, event: Any = None) -> Event:
        return Event(self._streams, {**self.seen, self: self.time})

    def wait_event(self, event: Event) -> None:
        self._streams.waits += 1
        for stream, time in event.times.items():
            self.seen[stream] = max(self.seen.get(stream, 0), time)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())


class _Uses:
    """Who used a storage last."""

    def __init__(self, home: Stream) -> None:
        self.home = home
        self.written: tuple[Stream, int] = (home, 0)
        self.read: dict[Stream, int] = {}


class Streams:
    """All streams of a device; ``waits`` counts how often one waited for another."""

    def __init__(self) -> None:
        self.main = self.current = Stream(self)
        self.host_waits: Callable[[], None] = self.finish
        self.waits = 0
        self.faults: list[str] = []
        self._uses: dict[int, _Uses] = {}

    def make(self, device: Any = None) -> Stream:
        return Stream(self)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def run(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        """Note an operation of the current stream on memory of the device or page-locked memory."""
        now = self.current
        now.time += 1
        for tensor, writes in [*((t, False) for t in read), *((t, True) for t in written)]:
            uses = self._of(tensor)
            others = [uses.written, *(uses.read.items() if writes else ())]
            if not all(now.knows(use) for use in others):
                what = "writes to" if writes else "reads"
                raise UnorderedError(f"{name} {what} {list(tensor.shape)} {tensor.dtype}, which another stream uses")
            if writes:
                uses.written, uses.read = (now, now.time), {}
            else:
                uses.read[now] = now.time

    def make_room(self, tensor: Tensor) -> None:
        """Note memory of the current stream: what was there before may be in use until this stream is there."""
        uses = self._of(tensor)
        uses.home, uses.written = self.current, (self.current, self.current.time)

    def _of(self, tensor: Tensor) -> _Uses:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._uses:
            self._uses[key] = _Uses(self.main)
            weakref.finalize(storage, self._given_back, key, storage.nbytes())
        return self._uses[key]

    def _given_back(self, key: int, size: int) -> None:
        uses = self._uses.pop(key)
        if not all(uses.home.knows(use) for use in [uses.written, *uses.read.items()]):
            self.faults.append(f"{size} bytes are given back while a copy may still use them")

    def finish(self) -> None:
        """All streams are done."""
        for stream in {self.main, *(s for uses in self._uses.values() for s in (uses.written[0], *uses.read))}:
            self.main.wait_event(stream.record_event())
        faults, self.faults = self.faults, []
        if faults:
            raise UnorderedError(faults[0])


def is_empty(name: str) -> bool:
    """Whether an operation makes memory without using it."""
    return name.startswith(("empty", "new_empty"))
