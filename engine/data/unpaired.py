"""Unpaired rows: one completion of a prompt and a label that says whether it is desirable, for KTO.

Pairs become such rows as TRL's ``unpair_preference_dataset`` makes them: of each ``ROWS_AT_ONCE`` pairs the chosen
responses come first, then the rejected ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ..errors import RowError
from .columns import column
from .examples import (
    Example,
    answer_messages,
    finite_numbers,
    prompt_messages,
    refuse_images,
    template_kwargs,
)
from .groups import PreferenceGroup
from .labels import label_of
from .sources import Row

ROWS_AT_ONCE = 1000
"""Rows of which TRL makes unpaired ones at a time."""
_SCORES = ("score", "rating", "reward")


def read_unpaired(row: Row) -> Example:
    """A row with a prompt, a completion and a label; text, or messages."""
    refuse_images(row)
    prompt, completion, _ = (column(row, name, "unpaired") for name in ("prompt", "completion", "label"))
    desirable, refs = label_of(row, "label"), row.data.get("ref_logps")
    if refs is not None:
        given = refs if isinstance(refs, list) else [refs]
        if len(given) != 1:
            raise RowError("bad_reference", f"{row.where}: column 'ref_logps' needs one number, got {len(given)}")
        refs = tuple(finite_numbers(given, row, "'ref_logps'", "bad_reference"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(row.index, row.where, "text", prompt, (completion,), refs, desirable=desirable)
    answer = answer_messages(completion, row, "completion")
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt_messages(prompt, row)
    return Example(row.index, row.where, "messages", start, (answer,), refs, template_kwargs(row), desirable=desirable)


def unpaired(groups: Iterable[PreferenceGroup]) -> Iterator[PreferenceGroup]:
    """The groups with each pair as two of one response; others as they are."""
    stream = iter(groups)
    while chunk := list(islice(stream, ROWS_AT_ONCE)):
        for side in (0, 1):
            for group in chunk:
                if len(group.response_ids) == 2 and group.desirable is None:
                    yield _side(group, side)
                elif side == 0:
                    yield group


def _side(group: PreferenceGroup, side: int) -> PreferenceGroup:
    def own(parts: tuple | None) -> tuple | None:
        return None if parts is None else (parts[side],)

    return replace(
        group,
        response_ids=(group.response_ids[side],),
        ref_logps=own(group.ref_logps),
        pairs=None,
        token_weights=own(group.token_weights),
        cut=own(group.cut),
        desirable=side == 0,
    )


class Labels:
    """What the labels of a set say of all its rows together."""

    def __init__(self) -> None:
        self._rows: dict[bool, array[int]] = {True: array("q"), False: array("q")}
        self._scores: dict[bool, list[float]] = {True: [], False: []}
        self._scored: array[int] = array("q")

    def note(self, example: Example, row: Row) -> None:
        """Take in a row; one without a label says nothing."""
        if example.desirable is None:
            return
        self._rows[example.desirable].append(row.index)
        score = next((row.data[name] for name in _SCORES if _is_number(row.data.get(name))), None)
        if score is not None:
            self._scores[example.desirable].append(float(score))
            self._scored.append(row.index)

    def problems(self) -> Iterator[tuple[str, int]]:
        """(problem, source row): ``one_label`` where no row has the other one, ``labels_reversed`` where scores of the
        rows say the opposite on average."""
        rows, other = sorted(self._rows.values(), key=len, reverse=True)
        if len(rows) > 1 and not other:
            yield from (("one_label", row) for row in rows)
        good, bad = (self._scores[label] for label in (True, False))
        if good and bad and sum(good) / len(good) < sum(bad) / len(bad):
            yield from (("labels_reversed", row) for row in self._scored)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
