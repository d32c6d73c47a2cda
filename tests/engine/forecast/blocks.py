"""Blocks of memory that torch takes and gives: of a forecast, of a run, and what a heap of their own makes of them.

The resident memory of a run is no measure for a test: a busy system drops pages of files that were not looked at for a
while, and objects of Python hold heaps open here or there. The blocks of a run are the same every time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Block = tuple[int, int]
"""A name, and the bytes that were taken; -1 where they were given back."""
HEAP = Path(__file__).resolve().parents[3] / "engine" / "forecast" / "heap.py"


class Blocks:
    """Stands where a forecast has its ``Heap``: one without holes, that remembers all blocks in their order."""

    def __init__(self) -> None:
        self.rows: list[Block] = []
        self.peak = 0
        self._held: dict[int, int] = {}
        self._current = 0

    @staticmethod
    def available() -> bool:
        return True

    def take(self, size: int) -> int:
        name = len(self.rows)
        self.rows.append((name, size))
        self._held[name] = size
        self._current += size
        self.peak = max(self.peak, self._current)
        return name

    def give(self, name: int | None) -> None:
        if name is not None:
            self.rows.append((name, -1))
            self._current -= self._held.pop(name)


def blocks_of(run: Callable[[], object]) -> Blocks:
    """The blocks that torch's allocator on the CPU took and gave back while ``run`` ran, as its profiler tells."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    found = [e for e in _events(profiled.profiler.kineto_results.experimental_event_tree()) if e.name == "[memory]"]
    blocks, names = Blocks(), {}
    for event in sorted(found, key=lambda e: e.start_time_ns):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            names[fields.ptr] = blocks.take(fields.alloc_size)
        else:
            blocks.give(names.pop(fields.ptr, None))
    return blocks


def _events(tree):
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


def replay(blocks: list[Block]) -> tuple[int, int]:
    """(peak of the heap, peak of its resident memory) of a process that does nothing else, with every block written."""
    command = [sys.executable, "-I", __file__]
    done = subprocess.run(command, input=json.dumps(blocks), capture_output=True, text=True, check=True)
    held, resident = map(int, done.stdout.split())
    return held, resident


def _replay(blocks: list[Block]) -> tuple[int, int]:
    # The module alone: its package imports torch.
    spec = importlib.util.spec_from_file_location("heap", HEAP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    start = anonymous()
    heap, addresses, resident = module.Heap(), {}, start
    for name, size in blocks:
        if size < 0:
            heap.give(addresses.pop(name))
            continue
        addresses[name] = heap.take(size)
        if size:
            ctypes.memset(addresses[name], 1, size)
        if size >= 2**16:
            resident = max(resident, anonymous())
    return heap.peak, resident - start


def anonymous() -> int:
    """Bytes of this process's memory that no file holds, swapped out or not."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


if __name__ == "__main__":
    print(*_replay(json.load(sys.stdin)))
