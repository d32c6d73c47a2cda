"""A row in the one shape that the rest of the package sees, and what readers of all layouts need to make it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RowError
from .columns import listed
from .sources import Row

Message = dict[str, Any]

# ShareGPT speakers as LLaMA-Factory and FastChat write them; unknown ones are an error.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}


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


class PromptsDifferError(Exception):
    """The two sides of a row answer different prompts. Lint counts such rows and drops them."""


def refuse_images(row: Row) -> None:
    if row.data.get("images") or row.data.get("image"):
        raise RowError(
            "has_images", f"{row.where}: the row has images, but only text is supported; remove the image columns"
        )


def finite_numbers(values: Sequence[Any], row: Row, name: str, problem: str) -> list[float]:
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if not good:
        raise RowError(problem, f"{row.where}: {name} must be finite numbers, got {list(values)}")
    return [float(v) for v in values]


def template_kwargs(row: Row) -> dict[str, Any]:
    tools = row.data.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError("wrong_type", f"{row.where}: column 'tools' holds broken JSON: {error.msg}") from None
    kwargs = row.data.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        kind = type(kwargs).__name__
        raise RowError("wrong_type", f"{row.where}: column 'chat_template_kwargs' must be an object, got {kind}")
    return {"tools": tools, **kwargs}


def messages_of(value: Any, row: Row, name: str) -> list[Message]:
    """Check a message list (or a lone message) and give every turn ``role`` and ``content``."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        kind = type(value).__name__
        raise RowError("wrong_type", f"{row.where}: column {name!r} must be a list of messages, got {kind}")
    messages = []
    for turn in turns:
        if turn.get("role") is not None:
            _check_content(turn, row, name)
            messages.append(turn)
            continue
        if turn.get("from") is None or "value" not in turn:
            keys = listed(turn)
            raise RowError("bad_turn", f"{row.where}: a turn of column {name!r} has {keys}; expected role and content")
        role = SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            speakers = ", ".join(SHAREGPT_ROLES)
            speaker = turn["from"]
            raise RowError(
                "bad_turn", f"{row.where}: column {name!r} has a turn from {speaker!r}; known are {speakers}"
            )
        rest = {key: item for key, item in turn.items() if key not in ("from", "value", "role", "content")}
        messages.append({"role": role, "content": turn["value"], **rest})
        _check_content(messages[-1], row, name)
    return messages


def _check_content(turn: Message, row: Row, name: str) -> None:
    """Refuse a turn without content: most templates would write the word None, or nothing, in its place."""
    content = turn.get("content")
    if isinstance(content, str | list) or (content is None and turn.get("tool_calls")):
        return
    got = "none" if content is None else type(content).__name__
    raise RowError("bad_turn", f"{row.where}: a turn of column {name!r} needs text as its content, got {got}")


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
