"""The columns of each layout: which layout a row has, and what to say where it has none."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import takewhile
from textwrap import wrap
from typing import Any

from ..errors import RowError
from .foreign import BESIDE_ANSWERS, FOREIGN
from .sources import Row
from .turns import NAMES_LISTED, listed

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

COLUMNS = {
    "preference": ("chosen", "rejected"),
    "hh": ("chosen", "rejected"),
    "sharegpt": ("conversations", "chosen", "rejected"),
    "kwise": ("prompt", "responses", "ranking"),
    "scored": ("prompt", "responses", "scores"),
    "tokenized": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired": ("prompt", "completion", "label"),
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
SHOWN_BY = "`dpo check` lists the layouts"
_NEAR = 0.8
"""Likeness, of 1, from which a name may be a misspelt one."""
_SAME = 0.9
"""From which it can hardly be anything else: prompts and promt, not promptId."""
_ANSWER = ("assistant", "gpt", "chatgpt", "model", "function_call", "tool_call")


def detect_format(row: Row, *, prompt_decided: bool = False) -> str:
    """Recognise the layout from the first row's columns.

    Args:
        prompt_decided: ``data.columns`` says where the prompt is, so that no other column is taken for it.

    Raises:
        UserError: no layout fits; names the columns that were found and those that would do.
    """
    columns = set(row.data)
    for name in _TOLD_BY_COLUMNS:
        if columns.issuperset(COLUMNS[name]):
            return name
    later = {*BESIDE_ANSWERS, "conversation", *(["labelled"] if columns.issuperset(COLUMNS["unpaired"]) else [])}
    for name, variants in FOREIGN.items():
        if name not in later and any(v.known_by(row.data) for v in variants):
            return name
    if columns.issuperset(COLUMNS["preference"]):
        return _layout_of_answers(row, prompt_decided)
    if is_scored(row.data):
        return "scored"
    if columns.issuperset(COLUMNS["unpaired"]):
        return "unpaired"
    hint = _likely(row) or (
        f"; rename them, or set data.columns: {{prompt: COLUMN, ...}}, or data.format to one of {', '.join(COLUMNS)}"
    )
    raise RowError(
        "missing_column",
        f"{row.where}: no known layout has the columns {listed(row.data)}{_no_pair(row)}{hint}; {SHOWN_BY}",
    )


def _layout_of_answers(row: Row, prompt_decided: bool) -> str:
    """The layout of a row with chosen and rejected, which may begin with their prompt or have it beside them."""
    sides = (row.data["chosen"], row.data["rejected"])
    if "prompt" in row.data:
        return "preference"
    for name in () if prompt_decided else BESIDE_ANSWERS:
        for variant in FOREIGN[name]:
            if variant.known_by(row.data) and not _begin_with(row.data[variant.columns[0]], sides):
                return name
    if not prompt_decided:
        _refuse_misspelt_prompt(row)
    dialogues = all(isinstance(side, str) and side.startswith(HUMAN) and ASSISTANT in side for side in sides)
    return "hh" if dialogues else "preference"


def _refuse_misspelt_prompt(row: Row) -> None:
    """A prompt column is optional, so one that is misspelt would go unnoticed."""
    for name in map(str, row.data):
        # Names such as prompt_id are columns of their own.
        if name.isalpha() and difflib.get_close_matches(name.lower(), ["prompt"], cutoff=_SAME):
            raise RowError(
                "unread_column",
                f"{row.where}: column {name!r} is not read (is it meant to be prompt?); rename it, set "
                f"data.columns: {{prompt: {name}}}, or set data.format to preference, or hh for Anthropic dialogues, "
                "to read chosen and rejected alone",
            )


def _begin_with(asked: Any, sides: tuple[Any, Any]) -> bool:
    """Whether chosen and rejected are whole by themselves, so that a column beside them only repeats their prompt."""
    if any(isinstance(side, list) for side in sides):
        firsts = [side[0] if isinstance(side, list) and side else None for side in sides]
        return all(isinstance(first, dict) and first.get("role", first.get("from")) not in _ANSWER for first in firsts)
    texts = [side for side in sides if isinstance(side, str)]
    if len(texts) < 2 or not isinstance(asked, str) or not asked.strip():
        return False
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    return asked.strip() in "".join(first for first, _ in shared)


def _no_pair(row: Row) -> str:
    """What to say of rows that have one answer each."""
    names = {str(name).lower() for name in row.data}
    one = names & {"response", "completion", "output"}
    if "prompt" not in names or not one:
        return ""
    return (
        f" (rows with one answer each, here {min(one)}, are no preference pairs; with a column label, true or false, "
        "they are rows for loss.loss_type kto)"
    )


def layouts() -> str:
    """The columns of the plain layouts, a line each, and the names of all others."""
    width = max(map(len, COLUMNS))
    lines = [f"  {name:<{width}}  {', '.join(names)}{_NOTES.get(name, '')}" for name, names in COLUMNS.items()]
    others = f"and those of other tools, whose columns are in docs/data.md: {', '.join(FOREIGN)}"
    lines += wrap(others, 110, initial_indent="  ", subsequent_indent="  ")
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


def _likely(row: Row) -> str:
    """A question for each column whose name is nearly one that is read."""
    known = dict.fromkeys(name for names in (*COLUMNS.values(), PROMPTS, RESPONSES, SCORES) for name in names)
    meant = {}
    for name in (str(name) for name in row.data if name not in known):
        if close := difflib.get_close_matches(name.lower(), known, n=1, cutoff=_NEAR):
            meant[name] = close[0]
    absent = {name: right for name, right in meant.items() if right not in row.data}
    return "".join(f" (is {name} meant to be {right}?)" for name, right in list(absent.items())[:NAMES_LISTED])


def _other_layout(row: Row, layout: str) -> str:
    """Advice to read the row as another layout, where its columns are those of one."""
    try:
        fitting = detect_format(row)
    except RowError:
        return ""
    return f"; these columns fit data.format {fitting}, or auto" if fitting != layout else ""


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
