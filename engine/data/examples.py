"""A row in the one shape that the rest of the package sees, and what readers of all layouts need to make it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import RowError
from .split_rows import Row, Turns
from .stored import without_none
from .turns import Message, TurnForm, listed

_USUAL_FORM = TurnForm()


@dataclass(frozen=True, slots=True)
class Example:
    """One row in one shape: a prompt and K completions, best first, all of one kind."""

    row: int
    where: str
    kind: Literal["text", "messages", "ids"]
    prompt: Any
    """str, list of messages or list of token ids."""
    completions: tuple[Any, ...]
    ref_logps: tuple[float, ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] | None = None
    """One for each completion, largest first; None when the row has none."""
    pairs: tuple[tuple[int, int], ...] | None = None
    """See ``PreferenceGroup.pairs``."""
    order: tuple[int, ...] | None = None
    """Where in its row each completion was; None where that is their order here."""
    weight: float = 1.0
    margin: float = 0.0
    token_weights: tuple[np.ndarray, ...] | None = None
    """float32 for each completion, of its tokens before they are cut; None: 1 each. See ``row_numbers.py``."""
    desirable: bool | None = None
    """Whether the only completion is a good one; None where completions are compared."""


class PromptsDifferError(Exception):
    """The two sides of a row answer different prompts. Lint counts such rows and drops them."""


def refuse_images(row: Row) -> None:
    if row.data.get("images") or row.data.get("image"):
        raise RowError(
            "has_images", f"{row.where}: the row has images, but only text is supported; remove the image columns"
        )


def needed(row: Row, name: str) -> Any:
    """The value of a column; RowError where there is none."""
    value = row.data.get(name)
    if value is None:
        problem, state = ("null_value", "empty") if name in row.data else ("missing_column", "missing")
        raise RowError(problem, f"{row.where}: column {name!r} is {state}; found columns {listed(row.data)}")
    return value


def finite_numbers(values: Sequence[Any], row: Row, name: str, problem: str) -> list[float]:
    """Numbers of a row; text of a number, as CSV has it, is one, too."""
    values = [_number(value) if isinstance(value, str) else value for value in values]
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if not good:
        raise RowError(problem, f"{row.where}: {name} must be finite numbers, got {list(values)}")
    return [float(v) for v in values]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def template_kwargs(row: Row) -> dict[str, Any]:
    """Arguments of the chat template that a row has. An empty list of tools is none, as TRL passes it."""
    tools = _decoded(row.data.get("tools"), row, "tools")
    if isinstance(tools, dict) and tools:
        tools = [tools]
    if tools and not isinstance(tools, list):
        raise RowError("wrong_type", f"{row.where}: column 'tools' must be a list, got {type(tools).__name__}")
    tools = [_decoded(tool, row, "tools") for tool in tools] if tools else None
    kwargs = _decoded(row.data.get("chat_template_kwargs"), row, "chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        kind = type(kwargs).__name__
        raise RowError("wrong_type", f"{row.where}: column 'chat_template_kwargs' must be an object, got {kind}")
    if form_of(row).removes_none:
        tools, kwargs = without_none(tools), without_none(kwargs)
    return {"tools": tools, **kwargs}


def _decoded(value: Any, row: Row, name: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError("wrong_type", f"{row.where}: column {name!r} holds broken JSON: {error.msg}") from None


def form_of(row: Row) -> Turns:
    """How turns of the row are written."""
    return row.form if row.form is not None else _USUAL_FORM


def messages_of(value: Any, row: Row, name: str) -> list[Message]:
    """Check a message list (or a lone message) and give every turn ``role`` and ``content``."""
    return form_of(row).turns(value, row, name)


def answer_messages(value: Any, row: Row, name: str) -> list[Message]:
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else messages_of(value, row, name)
    if not messages:
        raise RowError("bad_turn", f"{row.where}: column {name!r} has a response without turns")
    return messages


def prompt_messages(value: Any, row: Row) -> list[Message]:
    """A prompt of at least one turn."""
    messages = messages_of(value, row, "prompt")
    if not messages:
        raise RowError("bad_turn", f"{row.where}: column 'prompt' has no turns")
    return messages
