"""An exchange in columns of any names: a prompt with what stands beside it, and its answers, as text or turns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from ..errors import RowError
from .examples import answer_messages, messages_of, needed
from .labels import label_of
from .sources import Row
from .turns import Message


def text_of(row: Row, name: str) -> str:
    value = needed(row, name)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{row.where}: column {name!r} must be text, got {type(value).__name__}")
    return value


def what_is_asked(row: Row, name: str, below: str | None = None) -> str | list[Message]:
    """A prompt in text or turns, with the text of another column below it and ``history`` before it, where there are
    such."""
    extra = row.data.get(below) if below else None
    extra = extra if isinstance(extra, str) and extra.strip() else None
    value = "" if extra and row.data.get(name) is None else needed(row, name)
    history = row.data.get("history") if name != "history" else None
    if isinstance(value, str):
        if extra:
            value = f"{value}\n{extra}" if value.strip() else extra
        return [*_history(history, row), {"role": "user", "content": value}] if history else value
    turns = messages_of(value, row, name)
    if extra and below:
        turns = _with_text_below(turns, extra, below, row)
    systems = sum(1 for _ in takewhile(lambda turn: turn["role"] in ("system", "developer"), turns))
    return [*turns[:systems], *_history(history, row), *turns[systems:]] if history else turns


def _with_text_below(turns: list[Message], text: str, name: str, row: Row) -> list[Message]:
    """Turns with a text below what the user says last, unless it is there."""
    said = turns[-1].get("content") if turns and turns[-1]["role"] == "user" else None
    if not isinstance(said, str):
        raise RowError("bad_turn", f"{row.where}: column {name!r} has text, but the prompt does not end with the user")
    if f"\n{said.strip()}".endswith(f"\n{text.strip()}"):
        return turns
    return [*turns[:-1], {**turns[-1], "content": f"{said}\n{text}"}]


def _history(history: Any, row: Row) -> list[Message]:
    """Earlier exchanges: pairs of a question and its answer, or turns."""
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return messages_of(history, row, "history")
    turns: list[Message] = []
    for pair in history if isinstance(history, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("wrong_type", f"{row.where}: column 'history' must be a list of [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _stripped(turns: list[Message]) -> list[Message]:
    """Turns without white space around what they say, to compare them."""
    return [
        turn | {"content": said.strip()} if isinstance(said := turn.get("content"), str) else turn for turn in turns
    ]


def pair_of(prompt: str, chosen: str, rejected: str, below: str | None = None) -> Callable[[Row], dict[str, Any]]:
    """A prompt and two answers, in text or turns."""

    def convert(row: Row) -> dict[str, Any]:
        asked = what_is_asked(row, prompt, below)
        sides = needed(row, chosen), needed(row, rejected)
        if isinstance(asked, str) and all(isinstance(side, str) for side in sides):
            return {"prompt": asked, "chosen": sides[0], "rejected": sides[1]}
        start = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        answers = [answer_messages(side, row, name) for side, name in zip(sides, (chosen, rejected), strict=True)]
        if len(start) > 1 and start[-1]["role"] == "assistant" and _stripped(start[-1:]) == _stripped(answers[0]):
            # The conversation ends with the answer that was chosen.
            start = start[:-1]
        answers = [_without_prompt(answer, start) for answer in answers]
        return {"prompt": start, "chosen": answers[0], "rejected": answers[1]}

    return convert


def _without_prompt(answer: list[Message], start: list[Message]) -> list[Message]:
    """The answer of a side that may be the whole conversation."""
    size = len(start)
    return answer[size:] if len(answer) > size and _stripped(answer[:size]) == _stripped(start) else answer


def answer_of(prompt: str, completion: str, label: str, below: str | None) -> Callable[[Row], dict[str, Any]]:
    """A prompt and one answer with its label, in text or turns."""

    def convert(row: Row) -> dict[str, Any]:
        asked, said, desirable = what_is_asked(row, prompt, below), needed(row, completion), label_of(row, label)
        if isinstance(asked, str) and isinstance(said, str):
            return {"prompt": asked, "completion": said, "label": desirable}
        start = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        answer = _without_prompt(answer_messages(said, row, completion), start)
        return {"prompt": start, "completion": answer, "label": desirable}

    return convert


def last_answer_of(name: str, label: str) -> Callable[[Row], dict[str, Any]]:
    """A conversation that ends with the answer that its label is about."""

    def convert(row: Row) -> dict[str, Any]:
        start, answer = split_answer(messages_of(needed(row, name), row, name), row, name, "that has the label")
        return {"prompt": start, "completion": answer, "label": label_of(row, label)}

    return convert


def split_answer(turns: list[Message], row: Row, name: str, which: str) -> tuple[list[Message], list[Message]]:
    """What is asked, and the answer that the turns end with."""
    asked = max((i + 1 for i, turn in enumerate(turns) if turn["role"] != "assistant"), default=0)
    if not 0 < asked < len(turns):
        raise RowError("bad_turn", f"{row.where}: column {name!r} must end with the answer {which}")
    return turns[:asked], turns[asked:]
