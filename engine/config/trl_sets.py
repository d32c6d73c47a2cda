"""Data sets of other trainers as the sets of ``data.datasets``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

from .mixture import labels_of


@dataclass(frozen=True)
class Entry:
    """One data set, and how much of it is trained on: all of it unless one of the amounts is given."""

    name: str
    """A file, a folder or a name on the Hub."""
    config: str | None = None
    split: str = "train"
    eval_split: str | None = None
    """A split that is evaluated."""
    data_files: tuple[str, ...] = ()
    """Files of the set that are read instead of all."""
    fraction: float | None = None
    """A share of its rows; above 1 they come more than once."""
    drawn: bool = False
    """Whether the share is drawn at random; else it is the first rows."""
    rows: int | None = None
    """So many rows."""
    most: int | None = None
    """No more than its first rows."""
    weight: float | None = None
    """Its share of an epoch, relative to the other sets."""
    format: str | None = None
    columns: dict[str, str] | None = None
    """Column by part, where they have other names."""
    turn_fields: dict[str, str] | None = None
    roles: dict[str, str] | None = None

    @property
    def part(self) -> str:
        """Its split, as a slice where that says which rows are meant."""
        if "[" in self.split:
            return self.split
        if self.most is not None:
            return f"{self.split}[:{self.most}]"
        percent = 100 * (self.fraction or 0)
        if self.fraction is not None and self.fraction < 1 and float(percent).is_integer() and not self.drawn:
            return f"{self.split}[:{percent:.0f}%]"
        return self.split

    @property
    def is_whole(self) -> bool:
        """Whether its part of a split is all that there is to say about the amount."""
        named = self.part != self.split or self.fraction in (None, 1)
        return named and self.rows is None and self.weight is None and not self.data_files

    def settings(self) -> dict[str, Any]:
        """How rows are read, by the keys of ``data`` and of its sets."""
        columns = {part: name for part, name in (self.columns or {}).items() if part != name}
        fields = {part: name for part, name in (self.turn_fields or {}).items() if part != name}
        roles = {name: role for name, role in (self.roles or {}).items() if name != role}
        found = {"format": self.format, "columns": columns, "turn_fields": fields, "roles": roles}
        return {key: value for key, value in found.items() if value}

    def as_set(self) -> dict[str, Any]:
        """One of ``data.datasets``."""
        part = self.part
        amount: dict[str, Any] = {"fraction": 1.0 if part != self.split else self.fraction or 1.0}
        if self.rows is not None:
            amount = {"rows": self.rows}
        elif self.weight is not None:
            amount = {"weight": self.weight}
        found = {
            "name": self.name,
            "config": self.config,
            "split": None if part == "train" else part,
            "eval_split": self.eval_split,
            "data_files": list(self.data_files) or None,
            **amount,
        }
        return {key: value for key, value in found.items() if value is not None} | self.settings()


def as_sets(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """``data.datasets``; sets that would be called the same get labels."""
    named = [SimpleNamespace(label=None, name=one.name, config=one.config, split=one.part) for one in entries]
    labels = labels_of(named)
    taken: set[str] = set()
    sets = []
    for entry, label in zip(entries, labels, strict=True):
        numbered = (f"{label}-{number}" for number in count(2) if f"{label}-{number}" not in labels)
        own = {"label": next(name for name in numbered if name not in taken)} if label in taken else {}
        taken.add(own.get("label", label))
        sets.append(entry.as_set() | own)
    return sets
