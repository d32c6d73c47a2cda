"""Data sets of other trainers, in the terms of ``data``."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UserError
from ..mixture import AMOUNTS
from ..trl_sets import Entry, as_sets, hold_out_rows
from .reading import Reading, as_list

__all__ = ["Entry", "hold_out", "name_run", "put_data", "put_evaluation", "stop_early", "weighted"]


def put_data(reading: Reading, key: str, entries: list[Entry]) -> None:
    """Set ``data`` to the sets that a key names."""
    if not entries:
        reading.stop(key, "no data set is named", "name one")
        return
    if len(entries) > 1 or not entries[0].is_whole:
        sets = as_sets(entries)
        reading.put("data.datasets", sets)
        amounts = [f"{one['name']} {name} {one[name]:g}" for one in sets for name in AMOUNTS if name in one]
        reading.tell(key, f"-> data.datasets: {', '.join(amounts)}")
        if any("rows" in one or one.get("fraction", 1) % 1 for one in sets):
            text = "draws part of a set once for all epochs, here every epoch goes on where the last one ended"
            reading.changes(key, f"{reading.trainer.name} {text}")
        return
    entry = entries[0]
    reading.put("data.dataset_name", entry.name, key)
    if entry.config is not None:
        reading.put("data.dataset_config", entry.config, key)
    if entry.part != "train":
        reading.put("data.dataset_train_split", entry.part, key)
    for name, value in entry.settings().items():
        reading.put(f"data.{name}", value, key)


def weighted(reading: Reading, key: str, entries: list[Entry]) -> list[Entry]:
    """Sets with the probabilities that a key draws them by, if it is there."""
    given = reading.file.take(key)
    if given is None:
        return entries
    numbers = [reading.file.as_number(key, one) for one in as_list(reading, key, given)]
    if len(numbers) != len(entries):
        raise UserError(f"{reading.file.where(key)}: {len(numbers)} probabilities for {len(entries)} data sets")
    reading.changes(key, "-> data.datasets.weight: here an epoch has as many rows as all sets together")
    return [replace(entry, weight=number, rows=None) for entry, number in zip(entries, numbers, strict=True)]


def put_evaluation(reading: Reading, key: str, entries: list[Entry]) -> None:
    """Set the evaluation data to whole sets, which are read as the training data is."""
    data = reading.values.get("data", {})
    for entry in entries:
        own = {name: value for name, value in entry.settings().items() if value != data.get(name)}
        if entry.config is not None and entry.config != data.get("dataset_config"):
            own["config"] = entry.config
        if own:
            text = (
                f"{entry.name} is read in another way ({', '.join(own)}) than the training data, which cannot be said"
            )
            reading.stop(key, text)
    names, splits = [entry.name for entry in entries], [entry.part for entry in entries]
    if len(entries) == 1:
        reading.put("data.eval_dataset_name", names[0], key)
        reading.put("data.eval_dataset_split", splits[0], key)
        return
    labels = [name.rstrip("/").rpartition("/")[2].partition(".")[0] for name in names]
    if len(set(labels)) < len(labels):
        labels = [f"{label}-{place}" for place, label in enumerate(labels, start=1)]
    reading.put("data.eval_dataset_name", dict(zip(labels, names, strict=True)), key)
    reading.put("data.eval_dataset_split", dict(zip(labels, splits, strict=True)), key)


def hold_out(reading: Reading, key: str, size: float) -> None:
    """Evaluate a part of the training data: a share, or so many rows."""
    if not size:
        return
    found, text = hold_out_rows(reading.values.get("data", {}), size)
    for name, value in found.items():
        reading.put(f"data.{name}", value)
    reading.changes(key, text)


def name_run(reading: Reading, projects: str, runs: str = "") -> None:
    """What a run and its project are called by trackers: the first of several keys each."""
    for key, names in (("train.project", projects), ("train.run_name", runs)):
        given = [(name, reading.file.take(name)) for name in names.split()]
        if named := next(((name, value) for name, value in given if value not in (None, "")), None):
            reading.put(key, str(named[1]), named[0])


def stop_early(reading: Reading, key: str) -> None:
    """Evaluations in a row, none of them better, after which a run ends."""
    if (patience := reading.file.take(key)) not in (None, False, 0):
        reading.put("train.early_stopping_patience", reading.file.as_whole(key, patience), key)
