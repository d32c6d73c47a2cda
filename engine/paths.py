"""Names that users give to models and data: a path on this machine, or a name on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the home folder in place of a leading ``~``.

    Raises:
        UserError: there is none, as in a container whose user id is in no list.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: this user has no home folder that ~ could stand for; write the whole path") from error


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files, such as ``data/*.jsonl``."""
    return any(mark in name for mark in "*?[")


def names_a_path(name: str) -> bool:
    """Whether a name can only be one of this machine: it is there, or looks like a path and not like ``org/name``."""
    return is_pattern(name) or expanded(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
