"""Text that a row carries and that no part of its example holds: a prompt in a column that is not read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

from ..config.schema import DataConfig
from ..errors import RowError
from .examples import Example
from .sources import Row

DOCUMENTS = ("documents", "passages", "contexts", "articles", "knowledge")
"""What a prompt is answered from; lists of them hold ids and titles, too."""
PROMPT_NAMES = (
    "prompt", "prompts", "question", "instruction", "instructions", "input", "inputs", "query", "problem", "context",
    "history", "messages", "context_messages", "conversation", "conversations", "dialogue", "dialog", "trajectory",
    "user_prompt", "user_input", "document", "post", "passage", "article", "text_input", "premise", "user", "human",
    "task", "background", *DOCUMENTS,
)  # fmt: skip
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_PART = dict.fromkeys(PROMPT_NAMES, "prompt") | dict.fromkeys(SYSTEM_NAMES, "system")
_PART |= {"tools": "tools", "functions": "tools"}
_LAST_WORDS = ("prompt", "question", "instruction", "query", "problem", "messages", "context", "documents")
"""Of names such as ``original_question``; ``prompt_source`` and ``question_id`` are about a prompt."""
_FIRST_WORDS = re.compile(r"(prompt|question|instruction|input|query|problem|user)_(text|str|string|content|raw)")
_SENTENCE = re.compile(r"[^\W\d_]+\W+[^\W\d_]+\W+[^\W\d_]+")
"""Three words: no label, name or date."""
_WHAT = {"prompt": "a prompt", "system": "a system text", "tools": "tools for messages"}
_JOINED = ("input", "history")
"""Columns that layouts join to a prompt, so that being read is not enough."""
_LONG = 60
"""Characters of a text that is not inside another one by chance."""
_OPENS, _CLOSES = "\n:\"'`([{>*=", "\n\"'`)]}<*="
_ASKERS = frozenset({"user", "human", "system", "developer", "tool", "observation"})
_ASKED_KEYS = ("input", "instruction", "question", "prompt", "human", "user")


def refuse_unread(row: Row, example: Example, reads: Collection[str], data: DataConfig) -> None:
    """Stop at a column that looks like a prompt, is not read, and says something that the example does not.

    A part that ``data.columns`` names was decided on, so other columns that look like it are left alone; but the
    column that it names must be in the example.

    Raises:
        RowError: there is one.
    """
    if example.kind == "ids":
        return
    decided = data.columns or {}
    said = None
    for name, value in row.data.items():
        part = _part_of(str(name))
        if part is None or not value:
            continue
        joined = name in _JOINED and name in reads
        if not joined and (name not in row.mapped or part == "prompt") and part in decided:
            continue
        if part != "tools" and name in reads and not joined:
            continue
        if part == "tools":
            # Only a chat template writes tools.
            lost = example.kind == "text" and str(value).strip() not in ("[]", "{}", "null")
        else:
            said = said if said is not None else "\n".join(_given(example))
            lost = not all(_is_block(text.strip(), said) for text in _asked(value, str(name)))
        if lost:
            raise RowError(
                "unread_column",
                f"{row.where}: column {name!r} is not read, though it looks like {_WHAT[part]} and its text is in no "
                f"column that is: {_advice(str(name), part)}",
            )


@lru_cache(maxsize=4096)
def _part_of(name: str) -> str | None:
    """Which part a column's name stands for; ``Prompt``, ``user prompt`` and ``prompt_text`` are a prompt, too."""
    plain = re.sub(r"\W+", "_", name.strip().lower())
    if plain in _PART:
        return _PART[plain]
    asks = plain.endswith(tuple(f"_{word}" for word in _LAST_WORDS)) or _FIRST_WORDS.fullmatch(plain)
    return "prompt" if asks else None


def is_sentence(text: Any) -> bool:
    """Whether a value is text of three words or more."""
    return isinstance(text, str) and _SENTENCE.search(text) is not None


def _is_block(text: str, said: str) -> bool:
    """Whether ``said`` holds a text as a block: between line ends, a label or quotes; a long text anywhere."""
    if not text or (len(text) >= _LONG and text in said):
        return True
    at = said.find(text)
    while at >= 0:
        before, after = said[:at].rstrip(" \t"), said[at + len(text) :].lstrip(" \t")
        if (not before or before[-1] in _OPENS) and (not after or after[0] in _CLOSES):
            return True
        at = said.find(text, at + 1)
    return False


def _advice(name: str, part: str) -> str:
    if part == "prompt":
        return (
            f"name it with data.columns: {{prompt: {name}}} (is it meant to be prompt?), or leave it out with "
            "data.columns: {prompt: prompt}, or {prompt: null} where chosen and rejected begin with the prompt"
        )
    return f"set data.format: conversation to read it, or data.columns: {{{part}: null}} to leave it out"


def _given(example: Example) -> Iterator[str]:
    """What the model is given: the prompt, and turns of others among the completions."""
    if example.kind == "text":
        yield example.prompt
        return
    for completion in ([], *example.completions):
        turns = [turn for turn in completion if turn["role"] != "assistant"] if completion else example.prompt
        yield from _texts([turn.get("content") for turn in turns])


def _texts(value: Any) -> Iterator[str]:
    """Every text inside ``value``."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _asked(value: Any, name: str) -> Iterator[str]:
    """What a column asks: a text, or what its turns say that are not the assistant's; the sentences of documents."""
    if name.lower() in DOCUMENTS:
        yield from filter(is_sentence, _texts(value))
    else:
        yield from _said_by_askers(value)


def _said_by_askers(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _said_by_askers(item)
    elif isinstance(value, dict):
        speaker = value.get("role", value.get("from"))
        if isinstance(speaker, str):
            if speaker.lower() in _ASKERS:
                yield from _texts(value.get("content", value.get("value")))
        else:
            for key in _ASKED_KEYS:
                if isinstance(value.get(key), str):
                    yield value[key]
