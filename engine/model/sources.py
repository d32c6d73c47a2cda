"""What a user may have meant by the name of a model, and how to say that it does not load."""

from __future__ import annotations

import functools
import logging
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from engine.errors import UserError

_CONNECT_SECONDS = 5.0

log = logging.getLogger(__name__)


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


def hub_options(source: str, option: str) -> dict[str, Any]:
    """Further arguments of ``from_pretrained``: without a way to the Hub, what its cache has, at once and not after a
    minute of retries.

    Raises:
        UserError: the Hub cannot be reached and its cache has no such model.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).expanduser().is_dir() or constants.HF_HUB_OFFLINE:
        return {}
    reason = _unreachable(constants.ENDPOINT)
    if reason is None:
        return {}
    names = ("config.json", "tokenizer_config.json", "adapter_config.json")
    if not any(isinstance(try_to_load_from_cache(source, name), str) for name in names):
        raise UserError(
            f"{option}{source} is no folder here and not in the Hub's cache ({constants.HF_HUB_CACHE}), and "
            f"{constants.ENDPOINT} cannot be reached: {reason}; check the path, or the connection"
        )
    log.warning("%s cannot be reached: %s is read from the Hub's cache", constants.ENDPOINT, source)
    return {"local_files_only": True}


@functools.cache
def _unreachable(endpoint: str) -> str | None:
    """Why no connection opens, or None. Behind a proxy nobody knows but the proxy."""
    address = urlsplit(endpoint)
    if getproxies().get(address.scheme) or os.environ.get("ALL_PROXY") or address.hostname is None:
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def first_line(error: BaseException) -> str:
    """The line of a message that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # a heading alone says nothing
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def not_found(what: str, error: BaseException) -> UserError:
    """For a source that is neither a folder nor loads from the Hub."""
    reason = first_line(error).rstrip(".")
    return UserError(f"{what} is no folder here, and did not load from the Hub: {reason}; check the path or the Hub id")
