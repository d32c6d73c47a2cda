"""Sections that go wrong in every way, without torch, for the tests of what runs them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_table import Check, Context, Section, SkippedError


def _fine() -> float:
    return 1.0


def _raise() -> None:
    raise RuntimeError("\n  first line of the fault\nsecond line")


def _skip() -> None:
    raise SkippedError("nothing to do here")


def _garbage() -> float:
    os.write(1, bytes(range(256)) * 20 + b'\n{"kind": "row", "section": "later"\n\xff\xfe')
    print("x" * 100_000)
    return 1.0


def _hang() -> None:
    time.sleep(3600)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _parts(context: Context, end: Callable[[], Any]) -> dict[str, int]:
    """Three parts, in the second of which the process ends, once."""
    done = 0
    for part in ("one", "two", "three"):
        if context.begin(part):
            if part == "two":
                end()
            context.row(part, ms=1.5)
            done += 1
    return {"done": done}


def _made(*checks: Check) -> Callable[[Context], list[Check]]:
    return lambda context: list(checks)


def _in_parts(context: Context) -> Iterator[Check]:
    yield Check("with parts", lambda: _parts(context, _kill))
    yield Check("behind it", lambda: None)


def _no_list(context: Context) -> Iterator[Check]:
    raise ImportError("no module of that name")


def _wait_for(context: Context) -> Iterator[Check]:
    """Hangs, unless a file beside the results says that this is another run."""
    yield Check("before", _fine)
    yield Check("waits", lambda: None if Path(context.folder / "again").exists() else _hang())


SECTIONS = {
    "raising": Section(
        "raising",
        _made(
            Check("fine", _fine, 2.0),
            Check("raises", _raise),
            Check("too large", lambda: 3.0, 2.0),
            Check("not a number", lambda: float("nan"), 2.0),
            Check("skips", _skip),
            Check("says no", lambda: {"ok": False, "columns": [1, float("inf")]}),
            Check("bound twice", lambda: {"ok": True, "bound": 3.0}, 2.0),
        ),
        0,
        10,
    ),
    "dying": Section(
        "dying",
        _made(
            Check("fine", _fine),
            Check("exits", lambda: os._exit(3)),
            Check("leaves", lambda: sys.exit("enough")),
            Check("is killed", _kill),
            Check("loses its device", lambda: os._exit(70)),
            Check("crashes", lambda: ctypes.string_at(0)),
            Check("behind them", lambda: 2.0),
        ),
        0,
        10,
    ),
    # A dry run is eight times as patient.
    "hanging": Section("hanging", _made(Check("hangs", _hang, seconds=0.25), Check("behind it", _fine)), 0, 10),
    "garbage": Section("garbage", _made(Check("prints", _garbage), Check("behind it", _fine)), 0, 10),
    "parts": Section("parts", _in_parts, 0, 10),
    "import": Section("import", _no_list, 0, 10),
    "sharded": Section("sharded", _made(*(Check(str(i), _kill if i == 1 else (_fine)) for i in range(6))), 0, 10, 3),
    "later": Section("later", _made(Check("fine", _fine)), 1, 10),
    "waiting": Section("waiting", _wait_for, 2, 10),
    "last": Section("last", _made(Check("fine", _fine)), 3, 10),
}
