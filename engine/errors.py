"""The one error that a user is meant to see, and what the system's errors about disks mean."""

from __future__ import annotations

import errno
import signal

DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EIO: "the disk reported an input/output error",
}
_FIRST = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space or ") | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "check owner and mode or "
)


_GPU_MEMORY = ("CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what, where (file, row, field), what to do.

    The command line prints it as ``error: <message>`` and exits with code 2.
    """


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

    ``problem`` is its name in ``PROBLEMS`` of ``engine/data/lint.py``.
    """

    def __init__(self, problem: str, message: str):
        super().__init__(message)
        self.problem = problem


def disk_error(error: BaseException) -> tuple[str, str] | None:
    """(what is wrong, what to do) for an error of the system about a file; None for another one."""
    if isinstance(error, UserError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if number not in DISK_ERRORS:
        # safetensors, tokenizers and pyarrow carry the system's error only in their text
        text = str(error)
        number = next((n for n in DISK_ERRORS if f"os error {n})" in text or f"[Errno {n}]" in text), None)
    if number is None:
        return None
    return DISK_ERRORS[number], f"{_FIRST.get(number, '')}choose another place"


def counted(number: int, noun: str) -> str:
    """``1 pack``, ``1,234 packs``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
