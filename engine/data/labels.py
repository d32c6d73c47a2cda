"""Which of two answers is the better one: a label, a strength or a winner, as two scores; whether one is desirable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import RowError
from .examples import finite_numbers, needed
from .sources import Row

TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad")
Scores = tuple[float, float]
_LABELS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
"""Numbers 0 and 1 are equal to booleans, and their text is what CSV has."""


def _label(row: Row, name: str) -> Any:
    """The value that decides: of the layout's own column, unless ``data.columns`` names another one."""
    return needed(row, "label" if "label" in row.mapped else name)


def first_if(name: str, first: int) -> Callable[[Row], Scores]:
    """Scores of two answers of which the first is the better one where the label is ``first``, and 0 or 1."""

    def score(row: Row) -> Scores:
        label = _label(row, name)
        if label in ("0", "1"):
            label = int(label)
        if isinstance(label, bool) or label not in (0, 1):
            raise RowError("bad_score", f"{row.where}: column {name!r} must be 0 or 1, got {label!r}")
        return (1.0, 0.0) if label == first else (0.0, 1.0)

    return score


def strength(name: str) -> Callable[[Row], Scores]:
    """Scores by a strength that is negative where the first answer is better; their gap is its size."""

    def score(row: Row) -> Scores:
        (value,) = finite_numbers([_label(row, name)], row, f"column {name!r}", "bad_score")
        return -value, 0.0

    return score


def winner(row: Row) -> Scores:
    """Scores of model_a and model_b by the one that won; those of a tie are equal."""
    won = _label(row, "winner")
    if won not in ("model_a", "model_b", *TIES):
        known = ", ".join(("model_a", "model_b", *TIES))
        raise RowError("bad_score", f"{row.where}: column 'winner' must be one of {known}, got {won!r}")
    return float(won == "model_a"), float(won == "model_b")


def label_of(row: Row, name: str) -> bool:
    """Whether the row's completion is desirable.

    Raises:
        RowError: the column holds nothing, or neither true nor false.
    """
    value = needed(row, name)
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, bool | int | float | str) or key not in _LABELS:
        raise RowError(
            "bad_label",
            f"{row.where}: column {name!r} must be true (a desirable completion) or false, got {value!r}; correct the "
            "row",
        )
    return _LABELS[key]
