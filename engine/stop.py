"""Ending on request: SIGTERM and SIGUSR1 of a scheduler, SIGINT of a person.

A run that is asked to end finishes the step in progress, saves a checkpoint and ends with exit code 75, "try again
later" (130 after SIGINT). Requests may reach any of several processes: they tell each other between two steps, with
what they exchange there anyway. Where nothing can be lost a request ends the process at once; so does a second one
anywhere, and a first one that finds the process waiting for something that does not come.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import distributed
from .errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ECHO_SECONDS = 1.0
"""A scheduler signals a launcher and its processes, and the launcher passes it on: signals this close are one."""
_STUCK_SECONDS = 10.0
"""How long a process may stay inside a call, such as waiting for another process, where nothing can be lost."""


@dataclass
class _State:
    """Of this process."""

    request: int = 0
    """The first signal that came; 0 before."""
    promise: str = ""
    """What is done before the process ends; empty where it ends at once."""


_state = _State()


@contextmanager
def listening() -> Iterator[None]:
    """Turn signals into requests while this lasts; does nothing beside the main thread, which alone gets signals.

    A signal that the parent process had ignored stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.request, _state.promise = 0, ""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    # Python runs handlers between two of its own instructions: a thread hears signals inside long calls, too.
    ear = threading.Thread(target=_listen, args=(source,), name="signals", daemon=True)
    ear.start()
    before = {n: signal.getsignal(n) for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    wakeup = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        # A signal that comes now is noted and interrupts nothing of what follows.
        _state.promise = _state.promise or "this process ends"
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(sink)
        ear.join()
        os.close(source)
        # A request ends what listened to it, and nothing that this process does afterwards.
        _state.request, _state.promise = 0, ""


def _handle(number: int, frame: object) -> None:
    if _state.request:
        return
    _state.request = number
    if not _state.promise:
        raise Stopped(number)


def _listen(source: int) -> None:
    """End the process where its main thread does not, or is asked twice."""
    first: float | None = None
    while data := os.read(source, 1):
        number = data[0]
        if number not in _SIGNALS:
            continue
        now = time.monotonic()
        if first is None:
            first = now
            _acknowledge(number, source)
        elif now - first > _ECHO_SECONDS:
            os._exit(128 + number)


def _acknowledge(number: int, source: int) -> None:
    if _state.promise:
        if distributed.is_main():
            _tell(f"{signal.Signals(number).name}: {_state.promise}; a second signal ends at once")
        return
    deadline = time.monotonic() + _STUCK_SECONDS
    while not _state.request and time.monotonic() < deadline:
        # The end of listening, or another signal, is to be read by the caller.
        if select.select([source], [], [], 0.05)[0]:
            return
    if not _state.request and not _state.promise:
        end = Stopped(number)
        distributed.take_leave(end.exit_code, lambda: _tell(str(end)))
        os._exit(end.exit_code)


def _tell(line: str) -> None:
    # Not through Python's streams: the main thread may be in the middle of a line.
    os.write(2, f"{line}\n".encode())


@contextmanager
def postponed(promise: str) -> Iterator[None]:
    """While this lasts a request is only noted, for ``check`` to find.

    Args:
        promise: for people: what is done before the process ends.
    """
    outer, _state.promise = _state.promise, promise
    try:
        yield
    finally:
        _state.promise = outer


def requested() -> int:
    """The signal by which this process was asked to end; 0 when it was not."""
    return _state.request


def check() -> None:
    """Raise ``Stopped`` on all ranks when any process of the run was asked to end; every rank must call it."""
    heed(distributed.gather(requested()))


def heed(requests: Iterable[int]) -> None:
    """Raise ``Stopped`` when there is a signal among what ``requested`` was on each rank."""
    number = next(filter(None, requests), 0)
    if number:
        raise Stopped(number)
