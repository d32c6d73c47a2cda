"""A converted file of another trainer, and what there is to say about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

Effect = Literal["missing", "new", "same", "told"]
_TITLES = {
    "missing": "These are missing:",
    "new": "These change the result:",
    "same": "The result stays the same, which a test compares with {trainer}:",
    "told": "These were read, or are left out as nothing here needs them; no test compares them with {trainer}:",
}


@dataclass(frozen=True)
class Note:
    """What became of a key.

    ``effect`` says whether the run does not start without it, learns something else, learns the same (only where a test
    compares that with the other trainer), or should learn the same.
    """

    key: str
    effect: Effect
    text: str


@dataclass
class Conversion:
    """A converted file: sections of explicit keys, and what there is to say about it."""

    source: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    trainer: str = "TRL"
    """Whose file it was."""

    def report(self) -> str:
        """The notes for people, what a run does not start without first."""
        parts = []
        for effect, title in _TITLES.items():
            keys: dict[str, list[str]] = {}
            for note in self.notes:
                if note.effect == effect:
                    keys.setdefault(note.text, []).append(note.key)
            if keys:
                lines = [f"  {', '.join(names)}: {text}" for text, names in keys.items()]
                parts.append("\n".join([title.format(trainer=self.trainer), *lines]))
        return "\n".join(parts)

    def to_yaml(self) -> str:
        """The file to write: the notes as comments, then the sections."""
        header = [
            f"# Converted from {self.source} ({self.trainer}).",
            *(f"# {line}" for line in self.report().splitlines()),
        ]
        return "\n".join(header) + "\n\n" + yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True, width=120)
