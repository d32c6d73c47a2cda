"""What a section of ``benchmarks.gpu`` is made of, and what a check gets to work with.

A new check is one function and one line in a section's list.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gpu_journal import RUNNING, Journal

ROOT = Path(__file__).resolve().parents[1]


class SkippedError(Exception):
    """Why a check has nothing to do here."""


@dataclass(frozen=True)
class Check:
    """One row of the report, or several."""

    name: str
    run: Callable[[], Any]
    """Returns a number, a dictionary of columns (``ok`` among them decides), or None when running at all is success."""
    bound: float | None = None
    """The largest number that is right; anything is when None."""
    seconds: float = 90.0
    """When it has taken this long, it hangs."""


@dataclass(frozen=True)
class Section:
    """Checks that share a process, or several when there are ``shards``."""

    title: str
    checks: Callable[[Context], Iterable[Check]]
    stage: int
    """Sections of a stage run side by side, one stage after another."""
    seconds: float
    """Its share of the time; what earlier stages leave over comes on top."""
    shards: int = 1


@dataclass
class Context:
    """Device, sizes, time, and where results go."""

    journal: Journal
    folder: Path
    """For files that are results themselves."""
    dry_run: bool
    quick: bool
    """A dry run that leaves out what costs time and what another test looks at."""
    deadline: float
    """On the clock of ``time.monotonic``."""
    shard: int = 0
    section: str = ""
    check: str = ""
    dead: frozenset[str] = field(default_factory=frozenset)
    """Keys of rows during which a process of this section ended."""

    @cached_property
    def device(self) -> Any:
        import torch

        if not self.dry_run and not torch.cuda.is_available():
            raise SkippedError("torch sees no CUDA device; --dry-run runs the same on the CPU")
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def dtype(self) -> Any:
        import torch

        return torch.float32 if self.dry_run else torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def fact(self, name: str, value: Any) -> None:
        self.journal.append("fact", self.section, name=name, value=value)

    def row(self, part: str, **columns: Any) -> None:
        """A row of the running check beside its own."""
        columns.setdefault("status", "ok")
        self.journal.append("row", self.section, key=self.key(part), check=self.check, shard=self.shard, **columns)

    def begin(self, part: str) -> bool:
        """Mark a part of the running check as begun. False when a process ended there before: then leave it out."""
        if self.key(part) in self.dead:
            return False
        self.row(part, status=RUNNING)
        return True

    def key(self, part: str) -> str:
        return f"{self.check} | {part}"

    def synchronize(self) -> None:
        if not self.dry_run:
            import torch

            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        gc.collect()
        if not self.dry_run:
            import torch

            torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def place(error: BaseException) -> str:
    """The innermost frame of this repository in which it was raised, then the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    places = [f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in (*own[-1:], *frames[-1:])]
    return " > ".join(dict.fromkeys(places))
