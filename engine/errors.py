"""The one error that a user is meant to see, and what the system's errors about disks mean."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterable
from typing import NamedTuple


class DiskFault(NamedTuple):
    """What is wrong with a disk, a folder or a file on it."""

    what: str
    first: str = ""
    """What to do about it; empty where only another place helps."""

    def remedy(self, elsewhere: str = "choose another place") -> str:
        """What to do: about the fault, or elsewhere."""
        return f"{self.first} or {elsewhere}" if self.first else elsewhere


DISK_FAULTS = {
    errno.ENOSPC: DiskFault("no space left on the disk", "free space"),
    errno.EDQUOT: DiskFault("the disk quota is used up", "free space"),
    errno.EFBIG: DiskFault("the file is larger than this system allows", "raise the limit (ulimit -f)"),
    errno.EROFS: DiskFault("the file system is read-only", "make it writable"),
    errno.EACCES: DiskFault("permission denied", "check owner and mode"),
    errno.EPERM: DiskFault("permission denied", "check owner and mode"),
    errno.ENAMETOOLONG: DiskFault("the name is too long"),
    errno.ENOTDIR: DiskFault("a part of the path is a file, not a folder", "move that file away"),
    errno.EEXIST: DiskFault("a file of that name is in the way", "move it away"),
    errno.EISDIR: DiskFault("a folder of that name is in the way", "move it away"),
    errno.EIO: DiskFault("the disk reported an input/output error", "check the disk"),
    errno.ESTALE: DiskFault("the network file system has lost the file", "mount it again"),
}


_GPU_MEMORY = ("CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what, where (file, row, field), what to do.

    The command line prints it as ``error: <message>`` and exits with code 2.
    """


class SeveralErrors(UserError):  # noqa: N818 - it is several
    """Problems that are told at once; the command line prints a line for each."""

    def __init__(self, *errors: UserError):
        super().__init__(*errors)
        self.errors = errors

    def __str__(self) -> str:
        return "; ".join(map(str, self.errors))


def raise_all(checks: Iterable[Callable[[], object]]) -> None:
    """Call every check, and raise the ``UserError`` of each that fails, all at once.

    Raises:
        UserError: of the only check that fails, or a ``SeveralErrors``.
    """
    found: list[UserError] = []
    for check in checks:
        try:
            check()
        except SeveralErrors as several:
            found += several.errors
        except UserError as error:
            found.append(error)
    if found:
        raise found[0] if len(found) == 1 else SeveralErrors(*found)


class Stopped(KeyboardInterrupt):
    """The run ends because it was asked to. The message is one line: by what, where, how to go on."""

    def __init__(self, number: int, where: str = "", go_on: str = "run the same command again to go on"):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}{where}: {go_on}")

    @property
    def exit_code(self) -> int:
        """75, the system's "try again later", for a scheduler to start it again; 130 after Ctrl-C."""
        return 130 if self.number == signal.SIGINT else 75


class BackendError(UserError):
    """A library that computes a part of every model failed or cannot do what this one needs: not the model's fault."""


def out_of_memory(error: BaseException) -> str | None:
    """``GPU memory`` or ``memory`` when an error, or a cause of it, says that this is used up; None for another one."""
    seen: BaseException | None = error
    while seen is not None:
        # By name and text, since importing torch to compare types is slow.
        text = str(seen)
        if type(seen).__name__ == "OutOfMemoryError" or any(words in text for words in _GPU_MEMORY):
            return "GPU memory"
        if isinstance(seen, MemoryError) or any(words in text for words in _HOST_MEMORY):
            return "memory"
        seen = seen.__cause__
    return None


class RowError(UserError):
    """A row of the data that cannot be used: training stops at it, ``dpo check`` counts it and reads on.

    ``problem`` is its name in ``PROBLEMS`` of ``engine/data/problems.py``.
    """

    def __init__(self, problem: str, message: str):
        super().__init__(message)
        self.problem = problem


def disk_fault(error: BaseException) -> DiskFault | None:
    """What an error of the system says of a file; None for another error, or one that says nothing of disks."""
    if isinstance(error, UserError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if number not in DISK_FAULTS:
        # safetensors, tokenizers and pyarrow carry the system's error only in their text
        text = str(error)
        number = next((n for n in DISK_FAULTS if f"os error {n})" in text or f"[Errno {n}]" in text), None)
    return None if number is None else DISK_FAULTS[number]


def write_fault(error: OSError) -> DiskFault:
    """What stands in the way of a write, in the system's own words where there are no better ones."""
    return disk_fault(error) or DiskFault(error.strerror or str(error))


def counted(number: int, noun: str) -> str:
    """``1 pack``, ``1,234 packs``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shortened(text: str, length: int = 70) -> str:
    """A text in one line, cut where it is longer."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else f"{flat[: length - 3]}..."
