"""What ``benchmarks.gpu`` has found so far: a file of JSON lines that processes only ever append to.

Nothing that was appended is lost when a process is killed, at whatever moment; a torn last line is passed over. Lines:

``due``    a section is to run; what an earlier run found of it stays until it starts
``start``  a section begins anew: its earlier rows do not count
``again``  a section goes on: earlier rows count of checks of which every row said what there was to say
``plan``   the checks of a section, by name
``fact``   a value that belongs to a section as a whole
``row``    what one check or contender gave; a later row with the same key takes its place
``end``    how a section ended
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RUNNING = "running"
"""Status of a row whose check has begun and said nothing since."""
NO_TIME = "skipped: no time was left"


class Journal:
    """Appends to, and reads, one file. Any number of processes may append."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, kind: str, section: str, **values: Any) -> None:
        line = json.dumps(plain({"kind": kind, "section": section, **values}), allow_nan=False) + "\n"
        # One write to a file that is open for appending: lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def end_torn_line(self) -> None:
        """Start on a line of our own after a writer that was stopped within one."""
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def lines(self) -> Iterator[Row]:
        if not self.path.is_file():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and {"kind", "section"} <= value.keys():
                yield value

    def read(self) -> dict[str, Found]:
        """What is known of every section, in the order in which sections first began."""
        found: dict[str, Found] = {}
        for line in self.lines():
            kind, name = line.pop("kind"), line.pop("section")
            if kind == "start" or name not in found:
                found[name] = Found()
            section = found[name]
            if kind == "again":
                dropped = section.unsettled()
                section.by_key = {key: row for key, row in section.by_key.items() if row["check"] not in dropped}
                section.status = "unfinished"
            elif kind == "plan":
                section.plan += [check for check in line["names"] if check not in section.plan]
            elif kind == "fact":
                section.facts[line["name"]] = line["value"]
            elif kind == "row":
                section.by_key[line["key"]] = line
            elif kind == "end":
                section.status, section.seconds = line["status"], line["seconds"]
        return found


@dataclass
class Found:
    """A section, as far as it got."""

    status: str = "unfinished"
    seconds: float = 0.0
    plan: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    by_key: dict[str, Row] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        return list(self.by_key.values())

    def missing(self) -> list[str]:
        """Checks that were planned and never begun."""
        begun = {key for key, row in self.by_key.items() if row["status"] != NO_TIME}
        return [name for name in self.plan if name not in begun]

    def unsettled(self) -> set[str]:
        """Checks of which some row, their own or one of a part, leaves something to find out."""
        return {row["check"] for row in self.by_key.values() if not settled(row)}


def settled(row: Row) -> bool:
    """Whether there is nothing to find out by running it once more."""
    return row["status"] == "ok" or (row["status"].startswith("skipped") and row["status"] != NO_TIME)


def plain(value: Any) -> Any:
    """The same in JSON's terms; numbers that are not finite in words, what is none of them as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that whoever reads it finds the old or the new text, whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
