"""A converted TRL file, and what there is to say about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

Effect = Literal["same", "new"]


@dataclass(frozen=True)
class Note:
    """What became of a key. ``effect`` says whether the run still learns the same."""

    key: str
    effect: Effect
    text: str


@dataclass
class Conversion:
    """A converted file: sections of explicit keys, and what there is to say about it."""

    source: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def report(self) -> str:
        """The notes for people, what changes the result first."""
        parts = []
        for effect, title in (("new", "These change the result:"), ("same", "The result stays the same:")):
            keys: dict[str, list[str]] = {}
            for note in self.notes:
                if note.effect == effect:
                    keys.setdefault(note.text, []).append(note.key)
            if keys:
                lines = [f"  {', '.join(names)}: {text}" for text, names in keys.items()]
                parts.append("\n".join([title, *lines]))
        return "\n".join(parts)

    def to_yaml(self) -> str:
        """The file to write: the notes as comments, then the sections."""
        header = [f"# Converted from {self.source}.", *(f"# {line}" for line in self.report().splitlines())]
        return "\n".join(header) + "\n\n" + yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True, width=120)
