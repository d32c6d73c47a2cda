"""What becomes of the keys of another trainer: a rule for each.

``docs/converters.md`` shows the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class To:
    """The key of TRL that means the same. ``values`` are values that have other names there."""

    key: str
    values: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """A key that is left out.

    ``effect``: "told" changes nothing that is learned; "new" changes the result and is said; "stop" would train
    something else, so that nothing is converted. ``harmless`` are values at which the key changes nothing.
    """

    effect: Literal["told", "new", "stop"]
    reason: str
    harmless: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Read:
    """A key that the trainer's own function reads; ``text`` says what becomes of it."""

    text: str


Rule = To | Left | Read


def each(keys: str, rule: Rule) -> dict[str, Rule]:
    """The same rule for several keys."""
    return dict.fromkeys(keys.split(), rule)


def words(text: str) -> frozenset[str]:
    """Names with blanks between them."""
    return frozenset(text.split())


def described(rule: Rule) -> str:
    """A rule in words, for the tables of the documentation."""
    if isinstance(rule, To):
        renamed = ", ".join(f"{old} is {new}" for old, new in rule.values.items())
        return f"as TRL's `{rule.key}`" + (f"; {renamed}" if renamed else "")
    if isinstance(rule, Read):
        return rule.text
    effects = {"told": "left out", "new": "left out, changes the result", "stop": "stops the conversion"}
    harmless = ", ".join("none" if value is None else str(value).lower() for value in rule.harmless)
    return f"{effects[rule.effect]}: {rule.reason}" + (f" (unless {harmless})" if harmless else "")
