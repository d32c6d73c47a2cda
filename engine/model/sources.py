"""What a user may have meant by the name of a model, and how to say that it does not load."""

from __future__ import annotations

import logging
from typing import Any

from engine.errors import UserError
from engine.files import expanded
from engine.hub import unreachable

log = logging.getLogger(__name__)


def check_folder(source: str, option: str) -> None:
    """Raise a ``UserError`` unless a path that looks local is a folder; transformers would look for it on the Hub.

    Args:
        option: what the user wrote before ``source``, such as ``--model ``.
    """
    path = expanded(source)
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

    if expanded(source).is_dir() or constants.HF_HUB_OFFLINE:
        return {}
    reason = unreachable(constants.ENDPOINT)
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


def hide_weight_bars() -> None:
    """Silence the bars of transformers about weights that it reads and writes; those of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    silent = are_progress_bars_disabled()
    disable_progress_bar()
    if not silent:
        enable_progress_bars()


def first_line(error: BaseException) -> str:
    """The line of a message that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # a heading alone says nothing
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def not_found(what: str, error: BaseException) -> UserError:
    """For a source that is neither a folder nor loads from the Hub."""
    reason = first_line(error).rstrip(".")
    return UserError(f"{what} is no folder here, and did not load from the Hub: {reason}; check the path or the Hub id")
