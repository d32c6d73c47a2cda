"""What a user may have meant by the name of a model, and how to say that it does not load."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.schema import ModelConfig
from ..errors import UserError
from ..hub import unreachable
from ..paths import expanded, names_a_path

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
STATE_FILE = "trainer_state.json"
SHARDS = "shards"
"""Folder of a checkpoint that several processes wrote."""

log = logging.getLogger(__name__)


def check_folder(source: str, option: str) -> None:
    """Raise a ``UserError`` unless a path that looks local is a folder with a model; transformers would look for
    others on the Hub.

    Args:
        option: what the user wrote before ``source``, such as ``--model ``.
    """
    path = expanded(source)
    if path.is_dir():
        _refuse_shards(path, f"{option}{source}")
        return
    if names_a_path(source):
        raise UserError(f"{option}{source} is not a folder: give a model folder or a Hub id such as org/name")


@contextmanager
def named_by(option: str, source: str | None) -> Iterator[None]:
    """Errors inside about a model or adapter say once, and by the option that gave it, which one; None is no other than
    that of ``model``.

    Args:
        option: what the user wrote before ``source``, such as ``--model ``.
    """
    try:
        yield
    except UserError as error:
        if source is None:
            raise
        named = f"{option}{source}"
        of_source = rf"(?:model\.(?:model|adapter)_name_or_path=|the adapter ){re.escape(source)}(?![\w/-]|\.\w)"
        text = re.sub(of_source, lambda _: named, str(error))
        raise UserError(text if named in text else f"{named}: {text}") from error


def _refuse_shards(folder: Path, what: str) -> None:
    """Raise a ``UserError`` that says how a checkpoint of several processes becomes a model."""
    state = folder / STATE_FILE
    if not (folder / SHARDS).is_dir() or not state.is_file() or (folder / MODEL_CONFIG).exists():
        return
    step = json.loads(state.read_text(encoding="utf-8"))["step"]
    raise UserError(
        f"{what} is a checkpoint in the shards of several processes, not a model: copy it into a new folder NEW, and "
        f"`dpo train` with its configuration and --resume --train.max_steps {step} --train.output_dir NEW writes the "
        "model there, in one process or several"
    )


def needs_own_code(what: str, error: BaseException) -> UserError | None:
    """For a source whose Python code transformers would have to run, and does not without being told to."""
    if "trust_remote_code" not in str(error):
        return None
    return UserError(
        f"{what} comes with Python code of its own, which is not run unasked: read it, and set "
        "model.trust_remote_code to true to run it"
    )


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
    names = (MODEL_CONFIG, "tokenizer_config.json", ADAPTER_CONFIG)
    if not any(isinstance(try_to_load_from_cache(source, name), str) for name in names):
        raise UserError(
            f"{option}{source} is no folder here and not in the Hub's cache ({constants.HF_HUB_CACHE}), and "
            f"{constants.ENDPOINT} cannot be reached: {reason}; check the path, or the connection"
        )
    log.warning("%s cannot be reached: %s is read from the Hub's cache", constants.ENDPOINT, source)
    return {"local_files_only": True}


def num_embeddings(model: ModelConfig) -> int | None:
    """Tokens that a model has embeddings for, by its config; None where no config is at hand."""
    config = config_file(model, MODEL_CONFIG)
    text = config.get("text_config") or config.get("llm_config") or {}
    size = config.get("vocab_size", text.get("vocab_size"))
    return size if isinstance(size, int) else None


def config_file(model: ModelConfig, file: str) -> dict[str, Any]:
    """What a JSON file beside the model's weights says, in its folder or the Hub's cache; empty where there is none."""
    from huggingface_hub import try_to_load_from_cache

    name = model.model_name_or_path
    path = expanded(name) / file
    if not path.is_file():
        try:
            found = None if expanded(name).exists() else try_to_load_from_cache(name, file, revision=model.revision)
        except ValueError:
            # no name that the Hub could have
            found = None
        if not isinstance(found, str):
            return {}
        path = Path(found)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


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
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line.rstrip(" ,;")


def not_found(what: str, error: BaseException) -> UserError:
    """For a source that is neither a folder nor loads from the Hub."""
    reason = first_line(error).rstrip(".")
    return UserError(f"{what} is no folder here, and did not load from the Hub: {reason}; check the path or the Hub id")
