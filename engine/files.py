"""Files that are either whole or not there, whatever stops the process in between."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from .errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the home folder in place of a leading ``~``.

    Raises:
        UserError: there is none, as in a container whose user id is in no list.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: this user has no home folder that ~ could stand for; write the whole path") from error


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` under a temporary name beside ``path``, flush it to disk and rename it.

    Raises:
        OSError: it cannot be written; what was at ``path`` is untouched and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk. A rename is durable once its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
