"""Numbers of a row that change its loss: a weight, a target margin, and weights of single tokens.

Columns, wherever there are any: ``weight`` and ``margin``, a number each; ``mask`` (0, 1 or booleans) and ``weights``
(0 or more), a list for each response in the order of the row, each as long as the response has tokens, EOS included. Of
pairs, ``chosen_mask`` and ``rejected_mask`` (``chosen_weights``, ``rejected_weights``) may hold a side each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import RowError, counted
from .examples import Example, finite_numbers
from .groups import PreferenceDataset, PreferenceGroup
from .sources import Row

TOKEN_COLUMNS = ("mask", "weights")
NUMBER_COLUMNS = ("weight", "margin")
ROW_NUMBERS = (
    *NUMBER_COLUMNS,
    *(f"{side}{name}" for name in TOKEN_COLUMNS for side in ("", "chosen_", "rejected_")),
)
"""Columns that any layout may have."""
BAD = "bad_weight"
_USUAL = {"weight": (1.0, 1.0), "margin": (0.0, 0.0)}


def with_numbers(example: Example, row: Row) -> Example:
    """``example`` with the numbers of its row.

    Args:
        row: with columns by the names of their parts.

    Raises:
        RowError: a number that is not finite, a negative weight, or lists that are not one for each response.
    """
    if not any(row.data.get(name) is not None for name in ROW_NUMBERS):
        return example
    weight, margin = (_number(row, name) for name in NUMBER_COLUMNS)
    if weight is not None and weight < 0:
        raise _fault(row, "weight", f"must not be negative, got {weight:g}")
    mask, weights = (_lists(row, name, example) for name in TOKEN_COLUMNS)
    tokens = _times(mask, weights, row)
    return replace(
        example,
        weight=1.0 if weight is None else weight,
        margin=0.0 if margin is None else margin,
        token_weights=None if tokens is None else tuple(tokens),
    )


def _number(row: Row, name: str) -> float | None:
    value = row.data.get(name)
    if value is None:
        return None
    try:
        return finite_numbers([value], row, name, BAD)[0]
    except RowError:
        raise _fault(row, name, f"must be a finite number, got {value!r}") from None


def _lists(row: Row, name: str, example: Example) -> list[np.ndarray] | None:
    """The weights of each completion's tokens, best first: in one column, in the order of the row, or one a side."""
    responses = len(example.completions)
    whole, sides = row.data.get(name), [row.data.get(f"{side}_{name}") for side in ("chosen", "rejected")]
    if sides == [None, None]:
        values, named = whole, name
    else:
        named = f"chosen_{name} and rejected_{name}"
        if whole is not None:
            raise _fault(row, name, f"stands beside {named}; give one of the two")
        values = sides
    if values is None:
        return None
    if responses == 1 and isinstance(values, list) and not any(isinstance(value, list) for value in values):
        values = [values]
    if not isinstance(values, list) or len(values) != responses or not all(isinstance(v, list) for v in values):
        raise _fault(row, named, f"must hold {counted(responses, 'list')}, one for each response")
    found = [_token_weights(row, name, named, value) for value in values]
    return found if example.order is None or values is sides else [found[place] for place in example.order]


def _token_weights(row: Row, name: str, named: str, values: list[Any]) -> np.ndarray:
    numbers = np.array([_as_number(value) for value in values], np.float64)
    wrong = ~np.isfinite(numbers) | (numbers < 0)
    if name == "mask":
        wrong |= (numbers != 0) & (numbers != 1)
    if wrong.any():
        wanted = "0 or 1" if name == "mask" else "finite numbers, 0 or more"
        raise _fault(row, named, f"must be {wanted}, got {values[int(wrong.argmax())]!r}")
    return numbers.astype(np.float32)


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, bool | int | float) else float("nan")


def _times(mask: list[np.ndarray] | None, weights: list[np.ndarray] | None, row: Row) -> list[np.ndarray] | None:
    if mask is None or weights is None:
        return weights if mask is None else mask
    if [len(m) for m in mask] != [len(w) for w in weights]:
        raise _fault(row, "mask", "is not as long as column 'weights'")
    return [m * w for m, w in zip(mask, weights, strict=True)]


def _fault(row: Row, name: str, what: str) -> RowError:
    part = name.split(" ")[0]
    return RowError(
        BAD,
        f"{row.where}: column {name!r} {what}; correct the row, or set data.columns: {{{part}: null}} to leave it out",
    )


def response_weights(
    example: Example, response_ids: Sequence[Sequence[int]], left_out: Sequence[np.ndarray], room: int | None
) -> tuple[np.ndarray, ...] | None:
    """float32 [R] of each response, cut to ``room`` tokens; None where every token counts alike.

    Args:
        response_ids: before they are cut.
        left_out: bool [R] of each response, tokens that count nothing; empty for none.

    Raises:
        RowError: a list of the row is not as long as its response.
    """
    weights = example.token_weights
    if weights is None and not any(mask.any() for mask in left_out):
        return None
    sizes = [len(ids) for ids in response_ids]
    if weights is None:
        weights = tuple(np.ones(size, np.float32) for size in sizes)
    for place, (given, size) in enumerate(zip(weights, sizes, strict=True)):
        if len(given) != size:
            name = ("chosen", "rejected")[place] if len(sizes) == 2 else f"{place + 1}."
            raise RowError(
                BAD,
                f"{example.where}: mask or weights of the {name} completion have {counted(len(given), 'number')}, and "
                f"with this tokenizer it has {counted(size, 'token')}, EOS included; correct the row",
            )
    if left_out:
        weights = tuple(w * ~mask for w, mask in zip(weights, left_out, strict=True))
    return tuple(w[:room] for w in weights)


class NumberSummary:
    """What the numbers of many rows are, in words.

    Args:
        dataset: rows to begin with.
    """

    def __init__(self, dataset: PreferenceDataset | None = None) -> None:
        self._ranges: dict[str, tuple[float, float]] = {}
        self._tokens = self._left_out = 0
        self._weighted = False
        if dataset is not None and dataset.has_numbers:
            for group in dataset:
                self.note(group)

    def note(self, group: PreferenceGroup) -> None:
        """Take in the numbers of a row."""
        for name, value in (("weight", group.weight), ("margin", group.margin)):
            low, high = self._ranges.get(name, (value, value))
            self._ranges[name] = (min(low, value), max(high, value))
        self._tokens += sum(map(len, group.response_ids))
        for weights in group.token_weights or ():
            self._left_out += int((weights == 0).sum())
            self._weighted = self._weighted or bool(((weights != 0) & (weights != 1)).any())

    def has(self, name: str) -> bool:
        """Whether a row has a weight other than 1, or a margin other than 0."""
        return self._ranges.get(name, _USUAL[name]) != _USUAL[name]

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count differently."""
        return self._weighted or self._left_out > 0

    def words(self) -> str:
        """Such as "weight 0.5 to 2; 3.1% of completion tokens left out"; empty where all rows count alike."""
        parts = [f"{name} {low:g} to {high:g}" for name, (low, high) in self._ranges.items() if self.has(name)]
        if self._left_out:
            parts.append(f"{self._left_out / self._tokens:.1%} of completion tokens left out")
        if self._weighted:
            parts.append("tokens have weights")
        return "; ".join(parts)
