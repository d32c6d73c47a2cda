"""Text of a row that the chat template leaves out: what the row carries and the model never reads.

Two ways of looking. Every text must be found in what was rendered. And a conversation of the same shape, with a word of
its own in every place, is rendered once for each shape: so a short text that is left out is not taken for the same
word elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .examples import Example
from .tokenize import TEMPLATE_ERRORS, Encoder
from .turns import Message
from .unread import is_sentence

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
END_OF_THOUGHT = "</think>"
SHAPES_KEPT = 4096
_PROBLEMS = dict.fromkeys((*REASONING_FIELDS, "content (the reasoning)"), "lost_reasoning")
_KNOWN = frozenset({"role", "content", "tool_calls", *REASONING_FIELDS})
_PROBLEMS |= {"content": "lost_turn", "tool_calls": "lost_tool_calls", "tools": "lost_tools"}


class Lost(NamedTuple):
    """A text that is not rendered."""

    problem: str
    """Its name in ``PROBLEMS``."""
    place: str
    """Such as ``chosen[0].reasoning_content``."""


class LostText:
    """Finds what a chat template leaves out of rows.

    Args:
        encoder: renders the rows.
    """

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._by_shape: dict[str, tuple[tuple[int, str], ...]] = {}

    def find(self, example: Example, rendered: Sequence[str]) -> list[Lost]:
        """What is lost of a row of messages, at most once for each problem.

        Args:
            rendered: prompt + completion as text, for each completion.
        """
        found: dict[str, Lost] = {}
        for index, (completion, text) in enumerate(zip(example.completions, rendered, strict=True)):
            turns = example.prompt + completion
            places = dict.fromkeys((*self._of_shape(turns, example.template_kwargs), *_missing(turns, text)))
            for turn, field in places:
                lost = Lost(_PROBLEMS.get(field, "lost_field"), _place(example, index, turn, field))
                found.setdefault(lost.problem, lost)
        return list(found.values())

    def _of_shape(self, turns: list[Message], kwargs: Any) -> tuple[tuple[int, str], ...]:
        """(turn, field) of what the template leaves out of every conversation of this shape."""
        shape = json.dumps([list(map(_shape, turns)), {k: v for k, v in kwargs.items() if k != "tools"}], default=str)
        shape += _tool_shape(kwargs.get("tools"))
        if shape not in self._by_shape:
            if len(self._by_shape) >= SHAPES_KEPT:
                self._by_shape.clear()
            self._by_shape[shape] = self._probe(turns, dict(kwargs))
        return self._by_shape[shape]

    def _probe(self, turns: list[Message], kwargs: dict[str, Any]) -> tuple[tuple[int, str], ...]:
        words = _Words()
        probe = [words.turn(index, turn) for index, turn in enumerate(turns)]
        if kwargs.get("tools"):
            kwargs["tools"] = words.tools(kwargs["tools"])
        try:
            text = self._encoder.render(probe, **kwargs)
        except TEMPLATE_ERRORS:
            # It looks at the texts themselves, which are searched for in any case.
            return ()
        return tuple(dict.fromkeys(place for word, place in words.placed if word not in text))


def _missing(turns: list[Message], rendered: str) -> Iterator[tuple[int, str]]:
    """(turn, field) of texts that were not rendered, whatever the shape."""
    for index, turn in enumerate(turns):
        content = turn.get("content")
        if isinstance(content, str) and not _is_in(content, rendered):
            _, thought, answer = content.rpartition(END_OF_THOUGHT)
            reasons = thought and _is_in(answer, rendered)
            yield index, "content (the reasoning)" if reasons else "content"
        for field in REASONING_FIELDS:
            if isinstance(turn.get(field), str) and not _is_in(turn[field], rendered):
                yield index, field
        for field, value in turn.items():
            if field not in _KNOWN and is_sentence(value) and not _is_in(value, rendered):
                yield index, field


def _is_in(text: str, rendered: str) -> bool:
    """Whether a text is rendered, as it is or inside JSON; white space at the ends of its lines does not count."""
    if text.strip() in rendered:
        return True
    lines = [line.strip() for line in text.replace(END_OF_THOUGHT, "\n").replace("<think>", "\n").splitlines()]
    return all(
        line in rendered or any(json.dumps(line, ensure_ascii=a)[1:-1] in rendered for a in (False, True))
        for line in lines
    )


def _place(example: Example, completion: int, turn: int, field: str) -> str:
    if field == "tools":
        return "tools"
    size = len(example.prompt)
    if turn < size:
        return f"prompt[{turn}].{field}"
    names = ("chosen", "rejected") if len(example.completions) == 2 else ()
    name = names[completion] if names else f"responses[{completion}]"
    return f"{name}[{turn - size}].{field}"


def _shape(turn: Message) -> list[Any]:
    """What templates may look at in a turn, but for its texts."""
    content = turn.get("content")
    said = content if not isinstance(content, str) else END_OF_THOUGHT in content if content.strip() else ""
    calls = [sorted(_call(call)) + [type(_call(call).get("arguments")).__name__] for call in _calls(turn)]
    others = [
        [key, type(value).__name__] for key, value in turn.items() if key not in ("role", "content", "tool_calls")
    ]
    return [turn["role"], said, calls, others]


def _calls(turn: Message) -> list[Any]:
    calls = turn.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _call(call: Any) -> dict[str, Any]:
    inner = call.get("function") if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) else call if isinstance(call, dict) else {}


def _tool_shape(tools: Any) -> str:
    return "" if not tools else repr(sorted(tools[0])) if isinstance(tools[0], dict) else type(tools[0]).__name__


class _Words:
    """Words that occur nowhere else, and the (turn, field) that each stands in."""

    def __init__(self) -> None:
        self.placed: list[tuple[str, tuple[int, str]]] = []

    def _new(self, turn: int, field: str) -> str:
        word = f"zq{len(self.placed)}qz"
        self.placed.append((word, (turn, field)))
        return word

    def turn(self, index: int, turn: Message) -> Message:
        """A turn with a word for each of its texts."""
        made = dict(turn)
        content = turn.get("content")
        if isinstance(content, str) and content.strip():
            made["content"] = self._new(index, "content")
            if END_OF_THOUGHT in content:
                thought = self._new(index, "content (the reasoning)")
                made["content"] = f"<think>\n{thought}\n{END_OF_THOUGHT}\n\n{made['content']}"
        for field in REASONING_FIELDS:
            if isinstance(turn.get(field), str) and turn[field].strip():
                made[field] = self._new(index, field)
        if calls := _calls(turn):
            made["tool_calls"] = [self._call(index, call) for call in calls]
        return made

    def _call(self, index: int, call: Any) -> Any:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            return {**call, "function": self._call(index, call["function"])}
        if not isinstance(call, dict) or "name" not in call:
            return call
        made = {**call, "name": self._new(index, "tool_calls")}
        if isinstance(call.get("arguments"), dict) and call["arguments"]:
            made["arguments"] = {"value": self._new(index, "tool_calls")}
        return made

    def tools(self, tools: list[Any]) -> list[Any]:
        """The first of the tools, with words for its name and description."""
        tool = tools[0]
        return [self._tool(tool)] if isinstance(tool, dict) else tools

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self._tool(tool["function"])}
        texts = [key for key in ("name", "description") if isinstance(tool.get(key), str)]
        return {**tool, **{key: self._new(-1, "tools") for key in texts}}
