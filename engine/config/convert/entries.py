"""Data sets of other trainers, in the terms of ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .reading import Reading

PARTS = ("prompt", "chosen", "rejected", "system", "messages", "tools", "history", "input")


@dataclass(frozen=True)
class Entry:
    """One data set."""

    name: str
    """A file, a folder or a name on the Hub."""
    config: str | None = None
    split: str = "train"
    fraction: float | None = None
    """The first rows of the split, as a share; above 1 as a repetition."""
    rows: int | None = None
    """How many rows, the first ones."""
    weight: float | None = None
    """How often it is drawn from, beside the others."""
    format: str | None = None
    columns: dict[str, str] | None = None
    """Column by part, where they have other names."""
    turn_fields: dict[str, str] | None = None
    roles: dict[str, str] | None = None

    def settings(self) -> dict[str, Any]:
        """The keys of ``data`` that say how rows are read."""
        columns = {part: name for part, name in (self.columns or {}).items() if part != name}
        fields = {part: name for part, name in (self.turn_fields or {}).items() if part != name}
        roles = {name: role for name, role in (self.roles or {}).items() if name != role}
        found = {"format": self.format, "columns": columns, "turn_fields": fields, "roles": roles}
        return {key: value for key, value in found.items() if value}


def put_data(reading: Reading, key: str, entries: list[Entry]) -> None:
    """Set ``data`` to what the key names; several sets end the conversion."""
    if not entries:
        reading.stop(key, "no data set is named", "name one")
        return
    if len(entries) > 1:
        names = ", ".join(entry.name for entry in entries)
        text = f"{len(entries)} data sets ({names}) cannot be mixed here; one file, folder or Hub name is read"
        reading.stop(key, text, "join them and name the result")
        return
    entry = entries[0]
    reading.put("data.dataset_name", entry.name, key)
    if entry.config is not None:
        reading.put("data.dataset_config", entry.config, key)
    split = _part_of_split(reading, key, entry)
    if split != "train":
        reading.put("data.dataset_train_split", split, key)
    for name, value in entry.settings().items():
        reading.put(f"data.{name}", value, key)


def put_evaluation(reading: Reading, key: str, entry: Entry) -> None:
    """Set the evaluation data to one data set, which is read as the training data is."""
    reading.put("data.eval_dataset_name", entry.name, key)
    reading.put("data.eval_dataset_split", _part_of_split(reading, key, entry), key)
    if entry.config is not None and entry.config != reading.values.get("data", {}).get("dataset_config"):
        reading.stop(key, f"evaluation rows of the configuration {entry.config} cannot be read beside those of another")


def hold_out(reading: Reading, key: str, size: float) -> None:
    """Evaluate a part of the training data: a share, or so many rows."""
    data = reading.values.get("data", {})
    if not size:
        return
    if size < 1:
        reading.put("data.eval_fraction", float(size))
        reading.changes(key, f"-> data.eval_fraction {size:g}: other rows are held out, by what their prompts say")
        return
    count, split = int(size), str(data.get("dataset_train_split", "train"))
    if "[" in split or "dataset_name" not in data:
        reading.stop(key, f"{count} rows cannot be held out of {split}; give a share below 1")
        return
    reading.put("data.dataset_train_split", f"{split}[:-{count}]")
    reading.put("data.eval_dataset_name", data["dataset_name"])
    reading.put("data.eval_dataset_split", f"{split}[-{count}:]")
    reading.changes(key, f"the last {count} rows are held out, not {count} at random")


def _part_of_split(reading: Reading, key: str, entry: Entry) -> str:
    if entry.rows is not None:
        return f"{entry.split}[:{entry.rows}]"
    if entry.fraction is None or entry.fraction == 1:
        return entry.split
    percent = entry.fraction * 100
    if entry.fraction > 1 or "[" in entry.split or not float(percent).is_integer():
        reading.stop(
            key, f"{entry.fraction:g} of {entry.name} is no whole share of its rows", "write its rows to a file"
        )
        return entry.split
    return f"{entry.split}[:{percent:.0f}%]"
