"""What a user may have meant by the name of a model, and how to say that it does not load."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError


def check_folder(source: str, option: str) -> None:
    """Raise a ``UserError`` unless a path that looks local is a folder; transformers would look for it on the Hub.

    Args:
        option: what the user wrote before ``source``, such as ``--model ``.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{option}{source} is not a folder: give a model folder or a Hub id such as org/name")


def first_line(error: BaseException) -> str:
    """The line of a message that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # a heading alone says nothing
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def not_found(what: str, error: BaseException) -> UserError:
    """For a source that is neither a folder nor loads from the Hub."""
    reason = first_line(error).rstrip(".")
    return UserError(f"{what} is no folder here, and did not load from the Hub: {reason}; check the path or the Hub id")
