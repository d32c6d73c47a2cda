"""Data sets of other trainers as the sets of ``data.datasets``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def hold_out_rows(data: Mapping[str, Any], size: float) -> tuple[dict[str, Any], str]:
    """Keys of ``data`` that evaluate a part of what is trained on instead, and what there is to say.

    Args:
        data: with the training data.
        size: a share below 1, or so many rows.
    """
    if size < 1:
        text = f"-> data.eval_fraction {size:g}: other rows are held out, by what their prompts say"
        return {"eval_fraction": float(size)}, text
    count, split = int(size), str(data.get("dataset_train_split", "train"))
    sets = data.get("datasets") or ()
    cannot = "[" in split or "dataset_name" not in data
    if sets:
        cannot = count < len(sets) or any("[" in one.get("split", "") or "eval_split" in one for one in sets)
    if cannot:
        text = f"{count} rows cannot be held out by number of what is read, and all are trained on; "
        return {}, text + "data.eval_fraction holds out a share"
    if not sets:
        held = {"eval_dataset_name": data["dataset_name"], "eval_dataset_split": f"{split}[-{count}:]"}
        return {
            "dataset_train_split": f"{split}[:-{count}]",
            **held,
        }, f"the last {count} rows are held out, not {count} at random"
    counts = [count // len(sets) + (place < count % len(sets)) for place in range(len(sets))]
    parts = [(one, one.get("split", "train"), rows) for one, rows in zip(sets, counts, strict=True)]
    held_out = [{**one, "split": f"{part}[:-{rows}]", "eval_split": f"{part}[-{rows}:]"} for one, part, rows in parts]
    text = f"the last {counts[0]} rows of each of {len(sets)} sets are held out, not {count} of all at random"
    return {"datasets": held_out}, text
