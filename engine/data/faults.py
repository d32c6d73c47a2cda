"""What lint looks for in one row: in its text as it came, and in its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from .examples import Example
from .groups import PreferenceGroup
from .tokenize import Encoded, Encoder

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
REPEATED_CHARACTERS = 16
"""A completion may well begin with the few words of a shorter prompt."""
_DAMAGED = re.compile("[\ufffd\x00]")
"""What a wrong decoding leaves: the replacement character, and NUL."""
_ASKS = re.compile(
    r"\s*(?:(?:\*\*|#{1,6} *)?(?:Human|HUMAN|User|USER)(?:\*\*)? *:|#{2,6} *(?:Human|User|Instruction)s?:?\s"
    r"|<\|im_start\|>user|<\|user\|>|<\|start_header_id\|>user|<start_of_turn>user|\[INST\])"
)
"""A text that begins with the mark of another speaker than the one who answers."""


def text_faults(example: Example, encoder: Encoder) -> Iterator[str]:
    """Names of the problems of a row's text. Rows of token ids have none."""
    if any(_is_empty(example, completion, encoder) for completion in example.completions):
        yield "empty_completion"
    if example.kind == "ids":
        return
    prompt, *completions = (_text(part) for part in (example.prompt, *example.completions))
    if not prompt.strip():
        yield "empty_prompt"
    texts = [completion.removesuffix(encoder.eos_token or "") for completion in completions]
    if len(set(texts)) == len(texts) and len({"".join(text.split()) for text in texts}) < len(texts):
        yield "whitespace_difference"
    if _repeats_prompt(example):
        yield "prompt_repeated"
    elif (example.kind == "messages" and _odd_roles(example)) or any(map(_ASKS.match, completions)):
        yield "odd_roles"
    if _has_control_token(example, prompt, completions, encoder):
        yield "control_token"
    if any(_DAMAGED.search(text) for text in (prompt, *completions)):
        yield "damaged_text"


def token_faults(encoded: Encoded, group: PreferenceGroup, encoder: Encoder) -> Iterator[str]:
    """Names of the problems of a row's tokens, before and after truncation."""
    if len({ids.tobytes() for ids in group.response_ids}) < len(group.response_ids):
        yield "identical_completions"
    if encoded.merged:
        yield "boundary_merge"
    if encoder.bos_id is not None:
        starts = [(*encoded.prompt_ids[:2], *ids[:1])[:2] for ids in encoded.completion_ids]
        if (encoder.bos_id, encoder.bos_id) in starts:
            yield "double_bos"
    bodies = [_before_eos(ids, encoder.eos_id) for ids in encoded.completion_ids]
    if any(len(ids) - size > 1 for size, ids in zip(bodies, encoded.completion_ids, strict=True)):
        yield "double_eos"
    # Turns of a completion may each end with EOS.
    if not encoded.rendered and any(
        encoder.eos_id in ids[:size] for size, ids in zip(bodies, encoded.completion_ids, strict=True)
    ):
        yield "eos_inside"
    ends = [_end_of_turn(ids, encoder) for ids in encoded.completion_ids]
    if None in ends:
        yield "missing_eos"
    kept = [len(ids) for ids in group.response_ids]
    if any(size < len(ids) for size, ids in zip(kept, encoded.completion_ids, strict=True)):
        yield "truncated"
    if any(end is not None and end >= size for size, end in zip(kept, ends, strict=True)):
        yield "eos_lost"


def _before_eos(ids: list[int], eos_id: int | None) -> int:
    """How many tokens come before the EOS tokens that a completion ends with."""
    size = len(ids)
    while size and ids[size - 1] == eos_id:
        size -= 1
    return size


def _end_of_turn(ids: list[int], encoder: Encoder) -> int | None:
    """Where a completion's closing special token is. Some templates write a line break after it."""
    last = len(ids) - 1
    return next((i for i in (last, last - 1) if i >= 0 and ids[i] in encoder.special_ids), None)


def _is_empty(example: Example, completion: Any, encoder: Encoder) -> bool:
    if example.kind == "text":
        return not completion.removesuffix(encoder.eos_token).strip()
    if example.kind == "ids":
        return completion == [encoder.eos_id]
    return not any(_has_content(turn) for turn in completion)


def _has_content(turn: dict[str, Any]) -> bool:
    content = turn.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(turn.get("tool_calls"))


def _text(part: str | list[dict[str, Any]]) -> str:
    """A text, or everything that is said in messages."""
    if isinstance(part, str):
        return part
    return "\n".join(_said(turn) for turn in part)


def _said(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    said = content if isinstance(content, str) else "" if content is None else repr(content)
    return said + (repr(turn["tool_calls"]) if turn.get("tool_calls") else "")


def _repeats_prompt(example: Example) -> bool:
    """A completion begins with the whole prompt again: a conversation that was meant to replace both columns."""
    size = len(example.prompt)
    if size < (REPEATED_CHARACTERS if example.kind == "text" else 1):
        return False
    return any(completion[:size] == example.prompt and len(completion) > size for completion in example.completions)


def _has_control_token(example: Example, prompt: str, completions: Sequence[str], encoder: Encoder) -> bool:
    """Special tokens written out in what people said. In plain text the prompt may be a rendered template, and a
    completion may end with them."""
    pattern = encoder.control_tokens
    if pattern is None:
        return False
    if example.kind == "messages":
        return any(pattern.search(text) for text in (prompt, *completions))
    for text in completions:
        end = len(text.rstrip())
        for match in reversed(list(pattern.finditer(text))):
            if match.end() < end:
                return True
            end = len(text[: match.start()].rstrip())
    return False


def _odd_roles(example: Example) -> bool:
    """Whether turns are out of order: a system turn late, a speaker twice, a completion that is not the assistant's."""
    prompt = [turn["role"] for turn in example.prompt]
    for completion in example.completions:
        said = [turn["role"] for turn in completion]
        roles = prompt + said
        if not ROLES.issuperset(map(str, roles)) or not said or said[0] != "assistant" or said[-1] != "assistant":
            return True
        if any(role in ("system", "developer") for role in roles[1:]):
            return True
        if any(a == b and a in ("user", "assistant") for a, b in pairwise(roles)):
            return True
    return False
