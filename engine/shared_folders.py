"""Folders that all processes of a run must see as one."""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from . import distributed
from .durable import FILE_SUFFIX
from .errors import UserError, write_fault

_PATIENCE_SECONDS = 30.0
"""How long a network file system may take to show on one machine what another one has written."""


def check_shared(folder: Path, option: str) -> None:
    """Find out whether all processes see what rank 0 writes into ``folder``; in one process, do nothing.

    Args:
        folder: exists, or is created, on rank 0.
        option: what the user set it with, such as ``train.output_dir=runs/a``.

    Raises:
        UserError: a machine does not see it; or rank 0 cannot write there.
    """
    if distributed.size() == 1:
        return
    token = distributed.broadcast(_leave_token(folder, option) if distributed.is_main() else None)
    assert token is not None
    sees = distributed.gather((socket.gethostname(), _appears(folder / token)))
    if distributed.is_main():
        (folder / token).unlink(missing_ok=True)
    blind = sorted({host for host, found in sees if not found})
    if blind:
        raise UserError(
            f"{option} is not shared: what {sees[0][0]} writes there is not seen on {', '.join(blind)}; "
            "choose a folder on a file system that all machines share"
        )


def _leave_token(folder: Path, option: str) -> str:
    token = f".shared.{uuid.uuid4().hex}{FILE_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    except OSError as error:
        found = write_fault(error)
        raise UserError(f"cannot write to {option}: {found.what}; {found.remedy()}") from error
    return token


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
        # Listing a folder makes clients of network file systems ask again.
        with suppress(OSError):
            os.listdir(path.parent)
    return True
