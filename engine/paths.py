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


def cache_folder(name: str, option: str) -> Path:
    """``$DPO_CACHE/NAME``, or ``dpo-kernels/NAME`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Args:
        option: what gives another folder than this.

    Raises:
        UserError: none of the first two is set, and the user has no home.
    """
    if own := os.environ.get("DPO_CACHE"):
        return expanded(own) / name
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{option} is not set, and this user has no home folder for its default: set {option}, or the environment "
            "variable DPO_CACHE"
        ) from error
    return cache / "dpo-kernels" / name


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files, such as ``data/*.jsonl``."""
    return any(mark in name for mark in "*?[")


def names_a_path(name: str) -> bool:
    """Whether a name can only be one of this machine: it is there, or looks like a path and not like ``org/name``."""
    return is_pattern(name) or expanded(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
