"""Tokens whose text a pattern matches, by the places in the text that a tokenizer gives for its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import RowError, UserError

Span = tuple[int, int]


def check_offsets(tokenizer: PreTrainedTokenizerBase, own_chat: bool) -> None:
    """Raise a ``UserError`` unless the tokenizer says where its tokens are in a text."""
    if own_chat or not tokenizer.is_fast:
        raise UserError(
            f"data.mask_pattern needs to know where tokens are in the text, which {type(tokenizer).__name__} does not "
            "say: use a fast tokenizer (tokenizer.json), or give the rows a mask column"
        )


def left_out(pattern: re.Pattern[str], joint: str, start: int, spans: Sequence[Span], where: str) -> np.ndarray:
    """bool [R]: which completion tokens hold a character that the pattern matches in the completion's text.

    Args:
        joint: prompt and completion, which begins at ``start``.
        spans: of each completion token, where it begins and ends in ``joint``.

    Raises:
        RowError: a match without a token, so that the spans are wrong.
    """
    bounds = np.array(spans, np.int64).reshape(-1, 2)
    found = np.zeros(len(bounds), bool)
    for match in pattern.finditer(joint[start:]):
        first, last = (start + place for place in match.span())
        inside = (bounds[:, 0] < last) & (bounds[:, 1] > first)
        if match[0].strip() and not inside.any():
            raise RowError(
                "bad_weight",
                f"{where}: data.mask_pattern matches {match[0]!r}, and the tokenizer names no token there; use another "
                "version of it, or give the rows a mask column",
            )
        found |= inside
    return found
