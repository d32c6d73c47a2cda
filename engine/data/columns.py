"""The columns of each layout: which layout a row has, and what to say where it has none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import RowError
from .sources import Row

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

COLUMNS = {
    "preference": ("chosen", "rejected"),
    "hh": ("chosen", "rejected"),
    "sharegpt": ("conversations", "chosen", "rejected"),
    "kwise": ("prompt", "responses", "ranking"),
    "scored": ("prompt", "responses", "scores"),
    "tokenized": ("prompt_ids", "chosen_ids", "rejected_ids"),
}
_TOLD_BY_COLUMNS = ("tokenized", "kwise", "sharegpt")
"""Layouts that no row has the columns of by chance; the first that fits is taken."""
PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("responses", "completions", "generations")
SCORES = ("scores", "ratings", "rewards")
ITEM_TEXTS = ("response", "completion", "text", "content")
ITEM_SCORES = ("score", "overall_score", "rating", "reward")
"""Names of the parts of a completion that is an object, as in UltraFeedback."""
_NOTES = {
    "preference": ", and prompt unless both sides begin with it",
    "hh": " whose turns begin with '\\n\\nHuman:' and '\\n\\nAssistant:', as in Anthropic HH",
}
SHOWN_BY = "`dpo check` lists the columns of every layout"
_NAMES_LISTED, _NAME_WIDTH = 8, 40
_NEAR = 0.8
"""Likeness, of 1, from which a name may be a misspelt one."""
_SAME = 0.9
"""From which it can hardly be anything else: prompts and promt, not promptId."""


def detect_format(row: Row) -> str:
    """Recognise the layout from the first row's columns.

    Raises:
        UserError: no layout fits; names the columns that were found and those that would do.
    """
    columns = set(row.data)
    for name in _TOLD_BY_COLUMNS:
        if columns.issuperset(COLUMNS[name]):
            return name
    if columns.issuperset(COLUMNS["preference"]):
        sides = (row.data["chosen"], row.data["rejected"])
        dialogues = all(isinstance(side, str) and side.startswith(HUMAN) and ASSISTANT in side for side in sides)
        if "prompt" not in columns:
            _refuse_misspelt_prompt(row)
        return "hh" if dialogues and "prompt" not in columns else "preference"
    if is_scored(row.data):
        return "scored"
    hint = _likely(row) or "; rename them, or set data.format to one of " + ", ".join(COLUMNS)
    raise RowError(
        "missing_column", f"{row.where}: no known layout has the columns {listed(row.data)}{hint}; {SHOWN_BY}"
    )


def layouts() -> str:
    """The columns of every layout, a line each."""
    width = max(map(len, COLUMNS))
    lines = [f"  {name:<{width}}  {', '.join(names)}{_NOTES.get(name, '')}" for name, names in COLUMNS.items()]
    return "\n".join(["columns of the layouts that are known (data.format)", *lines])


def first_present(names: tuple[str, ...], data: Mapping[str, Any]) -> str | None:
    """The first of the names that ``data`` has a value for."""
    return next((name for name in names if data.get(name) is not None), None)


def is_scored(data: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt and responses with scores."""
    responses = first_present(RESPONSES, data)
    if first_present(PROMPTS, data) is None or responses is None:
        return False
    items = data[responses]
    inside = (
        isinstance(items, list) and bool(items) and isinstance(items[0], dict) and first_present(ITEM_SCORES, items[0])
    )
    return first_present(SCORES, data) is not None or bool(inside)


def _refuse_misspelt_prompt(row: Row) -> None:
    """A prompt column is optional, so one that is misspelt would go unnoticed."""
    for name in map(str, row.data):
        # Names such as prompt_id are columns of their own.
        if name.isalpha() and difflib.get_close_matches(name.lower(), ["prompt"], cutoff=_SAME):
            raise RowError(
                "missing_column",
                f"{row.where}: column {name!r} is not read (is it meant to be prompt?); rename it, or set "
                "data.format to preference, or hh for Anthropic dialogues, to read chosen and rejected alone",
            )


def _likely(row: Row) -> str:
    """A question for each column whose name is nearly one that is read."""
    known = dict.fromkeys(name for names in (*COLUMNS.values(), PROMPTS, RESPONSES, SCORES) for name in names)
    meant = {}
    for name in (str(name) for name in row.data if name not in known):
        if close := difflib.get_close_matches(name.lower(), known, n=1, cutoff=_NEAR):
            meant[name] = close[0]
    absent = {name: right for name, right in meant.items() if right not in row.data}
    return "".join(f" (is {name} meant to be {right}?)" for name, right in list(absent.items())[:_NAMES_LISTED])


def _other_layout(row: Row, layout: str) -> str:
    """Advice to read the row as another layout, where its columns are those of one."""
    try:
        fitting = detect_format(row)
    except RowError:
        return ""
    return f"; these columns fit data.format {fitting}, or auto" if fitting != layout else ""


def listed(names: Iterable[Any]) -> str:
    """Names for a message, in the order of the alphabet; of many, or very long ones, a part."""
    found = sorted(name if len(name) <= _NAME_WIDTH else f"{name[:_NAME_WIDTH]}..." for name in map(str, names))
    more = len(found) - _NAMES_LISTED
    return (", ".join(found[:_NAMES_LISTED]) or "none") + (f" and {more} more" if more > 0 else "")


def column(row: Row, name: str, layout: str) -> Any:
    """The value of a column that the layout needs; RowError where it is missing or null."""
    value = row.data.get(name)
    if value is None:
        found, expected = listed(row.data), ", ".join(COLUMNS[layout])
        problem, state = ("null_value", "empty") if name in row.data else ("missing_column", "missing")
        hint = _other_layout(row, layout) or _likely(row) if state == "missing" else ""
        raise RowError(
            problem,
            f"{row.where}: column {name!r} is {state}; found columns {found}; {layout} rows need {expected}{hint}",
        )
    return value
