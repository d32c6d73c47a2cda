"""What files make of values, undone: conversations and lists stored as JSON text, filler nulls."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from ..errors import RowError
from .sources import Row

LIST_COLUMNS = (
    "responses", "completions", "generations", "answers", "ranking", "scores", "ratings", "rewards", "ref_logps",
    "prompt_ids", "chosen_ids", "rejected_ids", "prompt_input_ids", "chosen_input_ids", "rejected_input_ids",
    "chosen_labels", "rejected_labels", "history", "output",
)  # fmt: skip
"""Columns whose text, as CSV has it, may stand for a list of anything."""
_PYTHON_TURN = re.compile(r"""^\s*\[?\s*(array\()?\s*\[?\{'(role|from|content|value)':""")


def decode_text(value: str, row: Row, name: str, is_turn: Callable[[Any], bool]) -> Any:
    """A conversation that is stored as JSON text, or as Python prints it; any other text as it is.

    Args:
        is_turn: whether an object is a turn of a conversation.

    Raises:
        RowError: text of a conversation that cannot be read, as numpy prints one.
    """
    if value.lstrip()[:1] not in ("[", "{") or value.rstrip()[-1:] not in ("]", "}"):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        if not _PYTHON_TURN.match(value):
            return value
        try:
            decoded = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(
                "wrong_type",
                f"{row.where}: column {name!r} holds a conversation as Python prints it, which cannot be read back; "
                "write it as JSON",
            ) from None
    if name in LIST_COLUMNS and isinstance(decoded, list):
        return decoded
    if name == "input" and isinstance(decoded, dict) and "messages" in decoded:
        return decoded
    turns = decoded if isinstance(decoded, list) else [decoded]
    return decoded if turns and all(map(is_turn, turns)) else value


def without_none(value: Any) -> Any:
    """``value`` without the keys of inner objects that have no value, as TRL's ``remove_none_values``.

    The content of a turn that calls tools stays, since templates tell an empty one from a missing one.
    """
    if isinstance(value, list):
        return [without_none(item) for item in value]
    if isinstance(value, dict):
        calls = bool(value.get("tool_calls"))
        return {
            key: without_none(item)
            for key, item in value.items()
            if item is not None or (calls and key in ("content", "value"))
        }
    return value
