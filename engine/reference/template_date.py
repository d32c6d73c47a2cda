"""One date for chat templates that write today's: prompts of another day are other tokens, with other references.

Llama 3.2, gpt-oss and Mistral Small write it. The date of a run is in its checkpoints and its ``config.yaml``, that of
a reference store in the store, so that neither a resume nor stored references depend on the day.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from .. import distributed
from ..config.schema import REFERENCE_FREE_LOSSES, RunConfig
from ..data.tokenize import writes_date
from ..durable import write_atomically
from ..errors import UserError
from ..paths import expanded
from ..plain_json import to_json
from .lookup import default_store_path

DATE_FILE = "template_date.json"

log = logging.getLogger(__name__)


def with_template_date(config: RunConfig, tokenizer: Any, saved: str | None = None, *, keep: bool = True) -> RunConfig:
    """``config`` with ``data.template_date`` set, where the chat template writes a date; the store keeps it.

    Args:
        saved: the date of the run that goes on, or is evaluated.
        keep: write the date into a reference store that has none.

    Raises:
        UserError: the store's date cannot be read or written.
    """
    if not writes_date(tokenizer, config.data):
        return config
    with_store = config.reference.mode in ("auto", "stored") and not REFERENCE_FREE_LOSSES.issuperset(
        config.loss.loss_types
    )
    chosen = None
    if distributed.is_main():
        path = expanded(config.reference.store or default_store_path()) / DATE_FILE
        stored = _read(path) if with_store else None
        day, origin = next(
            (day, origin)
            for day, origin in (
                (config.data.template_date, "data.template_date"),
                (saved, "the run has"),
                (stored, "the reference store has"),
                (date.today().isoformat(), "it is today"),
            )
            if day is not None
        )
        if keep and with_store and stored is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, to_json({"date": day}) + "\n")
        log.info("the chat template writes today's date: pinned to %s, as %s (data.template_date)", day, origin)
        chosen = day
    chosen = distributed.broadcast(chosen)
    return replace(config, data=replace(config.data, template_date=chosen))


def _read(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return date.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["date"]).isoformat()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no date ({error}); remove it, or set data.template_date") from None
