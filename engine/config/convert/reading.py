"""The one engine of all tables: the keys of another trainer become TRL's keys, sections and notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import SeveralErrors, UserError
from ..fields import nearest, show
from ..from_trl import convert_keys
from ..trl_conversion import Conversion, Effect, Note
from ..trl_file import TrlFile
from ..trl_keys import CONVERTED
from .rules import Left, Read, Rule, To

REMEDY = "remove the key to convert without it"


@dataclass(frozen=True, eq=False)
class Trainer:
    """Another trainer's files: a table of rules, its defaults, and a function for keys that only mean something
    together, such as those of adapters and data sets."""

    name: str
    marks: frozenset[str]
    """Keys that no other trainer has, which tell its files."""
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    """Its defaults, by TRL's keys, where they are not TRL's."""
    read: Callable[[Reading], None]
    """Reads the keys whose rule is ``Read``."""
    same_names: frozenset[str] = frozenset()
    """Keys of TRL that it has under their name and with their meaning."""


class Reading:
    """A file of another trainer while it is read.

    ``file`` has the keys that nobody has taken; what is handed on goes to ``trl`` (TRL's keys) or ``values`` (sections
    of the run configuration).
    """

    def __init__(self, trainer: Trainer, file: TrlFile, processes: int) -> None:
        self.trainer, self.file, self.processes = trainer, file, processes
        self.trl: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.values: dict[str, dict[str, Any]] = {}
        self.notes: list[Note] = []
        self.stops: list[UserError] = []

    def first(self, names: str, default: Any) -> tuple[str, Any]:
        """The first of several names of one key that the file has, and its value; all of them are taken."""
        given = [(name, self.file.take(name)) for name in names.split()]
        return next(((name, value) for name, value in given if value is not None), (names.split()[0], default))

    def hand(self, key: str, value: Any, theirs: str | None = None) -> None:
        """Hand a value on as TRL's ``key``, which the file calls ``theirs``."""
        self.trl[key] = value
        if theirs is not None and theirs != key:
            self.names[key] = theirs

    def put(self, key: str, value: Any, theirs: str | None = None) -> None:
        """Set a key of the run configuration such as ``data.format``, and say so."""
        section, _, name = key.partition(".")
        self.values.setdefault(section, {})[name] = value
        if theirs is not None:
            self.tell(theirs, f"-> {key} {value}")

    def tell(self, key: str, text: str) -> None:
        """Say what a key became that should not change what is learned."""
        self._note(key, "told", text)

    def changes(self, key: str, text: str) -> None:
        """Say what changes the result."""
        self._note(key, "new", text)

    def missing(self, key: str, text: str) -> None:
        """Say what the run does not start without."""
        self._note(key, "missing", text)

    def stop(self, key: str, text: str, remedy: str = REMEDY) -> None:
        """Nothing is converted, since what the key means would be lost."""
        self.stops.append(UserError(f"{self.file.where(key)}: {text}; {remedy}"))

    def _note(self, key: str, effect: Effect, text: str) -> None:
        self.notes.append(Note(key, effect, text))

    def raise_stops(self) -> None:
        """End where something would be lost.

        Raises:
            UserError: one, or all at once.
        """
        if self.stops:
            raise self.stops[0] if len(self.stops) == 1 else SeveralErrors(*self.stops)


def convert_with(trainer: Trainer, file: TrlFile, num_processes: int | None) -> Conversion:
    """Convert the flat keys of a file of ``trainer``.

    Raises:
        UserError: a value that the trainer would refuse, or one that would be lost.
    """
    # An empty value is the default everywhere but in TRL's own files.
    file = TrlFile(file.source, {key: value for key, value in file.keys.items() if value is not None}, file.lines)
    reading = Reading(trainer, file, num_processes or 1)
    given = set(file.keys)
    trainer.read(reading)
    for key in list(file.keys):
        _apply(reading, key, file.take(key))
    reading.raise_stops()
    _tell_the_rest(reading, given)
    for key, value in trainer.defaults.items():
        if key not in reading.trl and (reading.trl.get("use_peft") or not key.startswith("lora_")):
            reading.trl[key] = value
            reading.tell(_name_of(trainer, key), f"not given: {trainer.name}'s default, {_plain(value)}")
    trl = TrlFile(file.source, reading.trl, file.lines, reading.names)
    return convert_keys(
        trl, trainer=trainer.name, values=reading.values, notes=reading.notes, num_processes=num_processes
    )


def _apply(reading: Reading, key: str, value: Any) -> None:
    rule = reading.trainer.rules.get(key)
    if rule is None:
        if key in reading.trainer.same_names:
            reading.hand(key, value)
        else:
            _unknown(reading, key)
    elif isinstance(rule, To):
        renamed = isinstance(value, str | int | bool) and value in rule.values
        reading.hand(rule.key, rule.values[value] if renamed else value, key)
    elif isinstance(rule, Left):
        harmless = any(value == one and type(value) is type(one) for one in rule.harmless)
        if harmless and rule.effect != "told":
            reading.tell(key, f"{_plain(value)} is how it is here")
        elif rule.effect == "told":
            reading.tell(key, rule.reason)
        elif rule.effect == "new":
            reading.changes(key, rule.reason)
        else:
            reading.stop(key, rule.reason)
    else:
        reading.tell(key, rule.text)


def _tell_the_rest(reading: Reading, given: set[str]) -> None:
    """Say of keys that were read beside others, and of which nothing was said, what the table says."""
    handed = {reading.names.get(key, key) for key in reading.trl}
    told = {note.key.partition(".")[0] for note in reading.notes}
    for key in sorted(given - handed - told):
        if isinstance(rule := reading.trainer.rules.get(key), Read):
            reading.tell(key, f"read beside other keys: {rule.text}")


def _unknown(reading: Reading, key: str) -> None:
    trainer = reading.trainer
    close = nearest(key, [*trainer.rules, *sorted(trainer.same_names)])
    rule = trainer.rules.get(close or "")
    # A misspelt key may hold the length, the adapters or the data.
    if close and (isinstance(rule, To | Read) or (rule is None and close in trainer.same_names and close in CONVERTED)):
        reading.stop(key, f"not a key of {trainer.name} that is known here; did you mean {close}?")
    else:
        hint = f" (did you mean {close}?)" if close else ""
        reading.changes(key, f"not a key of {trainer.name} that is known here; dropped{hint}")


def _name_of(trainer: Trainer, key: str) -> str:
    return next((name for name, rule in trainer.rules.items() if isinstance(rule, To) and rule.key == key), key)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_list(reading: Reading, key: str, value: Any) -> list[Any]:
    """A value that may be a list, one item, or items with commas between them."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list):
        return value
    raise UserError(f"{reading.file.where(key)}: expected a list, got {show(value)}")
