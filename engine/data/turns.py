"""Turns of conversations in the one form that chat templates take, from the forms in which they are written.

Roles and fields by other names, content in parts, tool calls as JSON text, calls as turns of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..config.schema import DataConfig
from ..errors import RowError
from .sources import Row
from .stored import without_none

Message = dict[str, Any]

# ShareGPT speakers as LLaMA-Factory, FastChat and ms-swift write them; unknown ones are an error.
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
    "tool_call": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_OTHER_NAMES = frozenset(SHAREGPT_ROLES) - {"user", "assistant", "system", "developer", "tool", "model"}
"""Speakers that are no roles of any template, beside a ``role`` key, too."""
_CALLS = ("function_call", "tool_call")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_THINKING_PARTS = {"thinking": "thinking", "reasoning": "reasoning", "reasoning_text": "text"}


NAMES_LISTED, _NAME_WIDTH = 8, 40


def listed(names: Iterable[Any]) -> str:
    """Names for a message, in the order of the alphabet; of many, or very long ones, a part."""
    found = sorted(name if len(name) <= _NAME_WIDTH else f"{name[:_NAME_WIDTH]}..." for name in map(str, names))
    more = len(found) - NAMES_LISTED
    return (", ".join(found[:NAMES_LISTED]) or "none") + (f" and {more} more" if more > 0 else "")


class CallArguments(dict):
    """Arguments of a tool call that came as JSON text, which is kept for templates that write text."""

    def __init__(self, text: str, values: Mapping[str, Any]):
        super().__init__(values)
        self.text = text


class TurnForm:
    """How turns are written in a data set: ``data.turn_fields``, ``data.roles``, ``data.remove_none_values``."""

    def __init__(self, data: DataConfig | None = None):
        fields = (data.turn_fields if data is not None else None) or {}
        self.removes_none = data is None or data.remove_none_values
        self.role_keys = tuple(dict.fromkeys((fields.get("role", "role"), "role", "from")))
        self.content_keys = tuple(dict.fromkeys((fields.get("content", "content"), "content", "value")))
        self._own = {speaker.lower(): role for speaker, role in ((data.roles if data else None) or {}).items()}

    def turns(self, value: Any, row: Row, name: str) -> list[Message]:
        """A message list, or a lone message, in the form that templates take.

        Raises:
            RowError: something else, or a turn without role or content.
        """
        given = [value] if isinstance(value, dict) else value
        if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
            kind = type(value).__name__
            raise RowError("wrong_type", f"{row.where}: column {name!r} must be a list of messages, got {kind}")
        messages: list[Message] = []
        called = False
        for turn in without_none(given) if self.removes_none else given:
            calls_before, called = called, self._speaker(turn)[1].lower() in _CALLS
            message = self._turn(turn, row, name)
            if calls_before and called and message.get("tool_calls") and messages[-1].get("tool_calls"):
                # Calls that follow each other as turns of their own are one turn.
                messages[-1]["tool_calls"] = [*messages[-1]["tool_calls"], *message["tool_calls"]]
            else:
                messages.append(message)
        return messages

    def is_turn(self, value: Any) -> bool:
        """Whether a value is a turn: an object with a speaker, and something said."""
        if not isinstance(value, dict) or not any(isinstance(value.get(key), str) for key in self.role_keys):
            return False
        return bool(value.get("tool_calls")) or any(key in value for key in self.content_keys)

    def _speaker(self, turn: Message) -> tuple[str, str]:
        """(key, value) of the speaker; empty where there is none."""
        return next(((key, str(turn[key])) for key in self.role_keys if turn.get(key) is not None), ("", ""))

    def _turn(self, turn: Message, row: Row, name: str) -> Message:
        role_key, speaker = self._speaker(turn)
        content_key = next((key for key in self.content_keys if key in turn), None)
        content = None if content_key is None else turn[content_key]
        if not role_key or (role_key != "role" and content_key is None):
            keys = listed(turn)
            raise RowError("bad_turn", f"{row.where}: a turn of column {name!r} has {keys}; expected role and content")
        made: Message = {"role": self._role(speaker, role_key, row, name)}
        if content_key is not None:
            made["content"] = content
        made |= {key: item for key, item in turn.items() if key not in (role_key, content_key, "role", "content")}
        if isinstance(content, list):
            _join_parts(made, row, name)
        if speaker.lower() in _CALLS and isinstance(content, str) and (calls := _calls_in(content)):
            made |= {"content": "", "tool_calls": calls}
        call = made.get("function_call")
        if isinstance(call, dict) and isinstance(call.get("name"), str) and not made.get("tool_calls"):
            # the form before tool_calls
            del made["function_call"]
            made["tool_calls"] = [{"type": "function", "function": call}]
        if isinstance(made.get("tool_calls"), list):
            made["tool_calls"] = [_parsed_call(call, row, name) for call in made["tool_calls"]]
        _check_content(made, row, name)
        return made

    def _role(self, speaker: str, role_key: str, row: Row, name: str) -> str:
        lowered = speaker.lower()
        if lowered in self._own:
            return self._own[lowered]
        if role_key == "role":
            return SHAREGPT_ROLES[lowered] if lowered in _OTHER_NAMES else speaker
        role = SHAREGPT_ROLES.get(lowered)
        if role is None:
            speakers = ", ".join(SHAREGPT_ROLES)
            raise RowError(
                "bad_turn",
                f"{row.where}: column {name!r} has a turn from {speaker!r}; known are {speakers}; "
                "data.roles gives others a role",
            )
        return role


def _check_content(turn: Message, row: Row, name: str) -> None:
    """Refuse a turn without content: most templates would write the word None, or nothing, in its place."""
    content = turn.get("content")
    if isinstance(content, str) or (content is None and turn.get("tool_calls")):
        return
    got = "none" if content is None else type(content).__name__
    raise RowError("bad_turn", f"{row.where}: a turn of column {name!r} needs text as its content, got {got}")


def _join_parts(turn: Message, row: Row, name: str) -> None:
    """Content as one text where it came in parts; a reasoning among them becomes that of the turn."""
    texts, thoughts = [], []
    for part in turn["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _THINKING_PARTS and isinstance(part.get(_THINKING_PARTS[kind]), str):
            thoughts.append(part[_THINKING_PARTS[kind]])
        elif isinstance(kind, str) and any(word in kind for word in ("image", "video", "audio", "file")):
            raise RowError(
                "has_images",
                f"{row.where}: a turn of column {name!r} has a part of type {kind}, but only text is supported; "
                "remove such rows, or their parts",
            )
        else:
            shown = f"of type {kind}" if kind is not None else "without a type and text"
            raise RowError(
                "bad_turn",
                f"{row.where}: the content of a turn of column {name!r} has a part {shown}; parts of type text are "
                "read",
            )
    turn["content"] = "".join(texts)
    if thoughts:
        turn.setdefault("reasoning_content", "\n".join(thoughts))


def _calls_in(text: str) -> list[dict[str, Any]]:
    """The calls that a turn of its own writes as JSON; none when it is another text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        return []
    named = [{"name": c["name"], "arguments": c.get("arguments", c.get("parameters", {}))} for c in calls]
    return [{"type": "function", "function": call} for call in named]


def _parsed_call(call: Any, row: Row, name: str) -> Any:
    """A tool call with its arguments as an object; OpenAI's own format has them as JSON text."""
    if isinstance(call, str):
        # a list of calls of which each is JSON text
        try:
            call = json.loads(call)
        except ValueError:
            call = None
    if not isinstance(call, dict):
        raise RowError("bad_turn", f"{row.where}: a tool call of column {name!r} is no object")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _parsed_call(call["function"], row, name)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        values = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RowError(
            "bad_turn", f"{row.where}: arguments of a tool call of column {name!r} are text that is no JSON object"
        )
    return {**call, "arguments": CallArguments(arguments, values)}


def with_text_arguments(messages: list[Message]) -> list[Message] | None:
    """``messages`` with the arguments of tool calls as JSON text, for templates that join them to text.

    Returns:
        None when no tool is called.
    """
    found = False
    changed = []
    for turn in messages:
        calls = turn.get("tool_calls")
        if isinstance(calls, list):
            found, calls = True, [_text_call(call) for call in calls]
            turn = {**turn, "tool_calls": calls}
        changed.append(turn)
    return changed if found else None


def _text_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _text_call(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return call
    text = arguments.text if isinstance(arguments, CallArguments) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "arguments": text}
