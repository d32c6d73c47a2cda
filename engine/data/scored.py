"""Rows of scored completions: K answers to one prompt, each with a number, and the pairs that they stand for.

The prompt and the K responses stay one group, so they are laid out, computed and stored once, however many pairs there
are.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

from ..config.schema import DataConfig
from ..errors import RowError
from .columns import ITEM_SCORES, ITEM_TEXTS, PROMPTS, RESPONSES, SCORES, first_present
from .examples import (
    Example,
    answer_messages,
    finite_numbers,
    prompt_messages,
    refuse_images,
    template_kwargs,
)
from .lint import LintReport
from .sources import Row

_SIDE_SCORE = ("score", "rating", "reward")


def scores_reversed(row: Row) -> bool:
    """Whether columns such as ``score_chosen`` and ``chosen-rating`` put the rejected answer above the chosen one."""
    for word in _SIDE_SCORE:
        for form in (f"{word}_{{}}", f"{{}}_{word}", f"{{}}-{word}"):
            names = form.format("chosen"), form.format("rejected")
            try:
                chosen, rejected = (float(row.data[name]) for name in names)
            except (KeyError, TypeError, ValueError):
                continue
            return chosen < rejected
    return False


def _needed(row: Row, what: str, names: tuple[str, ...]) -> str:
    found = first_present(names, row.data)
    if found is None:
        raise RowError("missing_column", f"{row.where}: the row needs {what}: one of {', '.join(names)}")
    return found


def read_scored(row: Row) -> Example:
    """A row as an example, its completions best first; of equal scores the first in the row is first.

    Raises:
        RowError: not a prompt and two or more responses, each with a finite score.
    """
    refuse_images(row)
    prompt_name, name = (_needed(row, *part) for part in (("a prompt", PROMPTS), ("a list of responses", RESPONSES)))
    prompt, items = row.data[prompt_name], row.data[name]
    if not isinstance(items, list) or len(items) < 2:
        count = len(items) if isinstance(items, list) else type(items).__name__
        raise RowError("bad_score", f"{row.where}: {name!r} needs 2 responses or more, got {count}")
    responses, scores = _texts_and_scores(row, items)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    best_first = tuple(scores[i] for i in order)
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
        texts = tuple(responses[i] for i in order)
        return Example(row.index, row.where, "text", prompt, texts, scores=best_first, order=tuple(order))
    answers = tuple(answer_messages(responses[i], row, "responses") for i in order)
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt_messages(prompt, row)
    kwargs, places = template_kwargs(row), tuple(order)
    return Example(
        row.index, row.where, "messages", start, answers, template_kwargs=kwargs, scores=best_first, order=places
    )


def _texts_and_scores(row: Row, items: list[Any]) -> tuple[list[Any], list[float]]:
    column = first_present(SCORES, row.data)
    if column is not None:
        values = row.data[column]
        if not isinstance(values, list) or len(values) != len(items):
            raise RowError("bad_score", f"{row.where}: {column!r} needs one score for each of {len(items)} responses")
    else:
        values = []
        for item in items:
            key = first_present(ITEM_SCORES, item) if isinstance(item, dict) else None
            if key is None:
                raise RowError("bad_score", f"{row.where}: a completion has no score: one of {', '.join(ITEM_SCORES)}")
            values.append(item[key])
    texts = []
    for item in items:
        is_turn = isinstance(item, dict) and "role" in item
        key = first_present(ITEM_TEXTS, item) if isinstance(item, dict) and not is_turn else None
        if isinstance(item, dict) and not is_turn and key is None:
            raise RowError("bad_turn", f"{row.where}: a completion has no text: one of {', '.join(ITEM_TEXTS)}")
        texts.append(item if key is None else item[key])
    return texts, finite_numbers(values, row, "scores", "bad_score")


def expand_scores(example: Example, data: DataConfig, report: LintReport) -> Example | None:
    """``example`` with the pairs that ``data.scored_pairs`` asks for, and only the completions that they need.

    Returns:
        None when no pair is left; the report says so.
    """
    assert example.scores is not None
    scores = example.scores

    def apart(better: int, worse: int) -> bool:
        gap = scores[better] - scores[worse]
        return gap > 0 and gap >= data.min_score_gap

    everyone = range(len(scores))
    if data.scored_pairs == "ranking":
        if not all(apart(i, i + 1) for i in everyone[:-1]):
            report.add("tied_ranking", example.row)
            return None
        return example
    asked = {
        "all": list(combinations(everyone, 2)),
        "best_vs_rest": [(0, i) for i in everyone[1:]],
        "best_worst": [(0, everyone[-1])],
    }[data.scored_pairs]
    pairs = [pair for pair in asked if apart(*pair)]
    if not pairs:
        report.add("no_scored_pair", example.row)
        return None
    if len(pairs) < len(asked):
        report.add("tied_scores", example.row)
    used = sorted({i for pair in pairs for i in pair})
    place = {i: k for k, i in enumerate(used)}
    return replace(
        example,
        completions=tuple(example.completions[i] for i in used),
        scores=tuple(scores[i] for i in used),
        token_weights=None if (weights := example.token_weights) is None else tuple(weights[i] for i in used),
        # Two responses are a pair as they are.
        pairs=None if len(used) == 2 else tuple((place[a], place[b]) for a, b in pairs),
    )
