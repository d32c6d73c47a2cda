"""Attributes of a model that are exchanged for others of the same meaning, and can be changed back at any time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

ABSENT: Any = object()
"""Stands for no attribute."""


class Kernels(NamedTuple):
    """What computes decoder blocks, and why."""

    name: str = "none"
    reason: str = ""


class Change(NamedTuple):
    """One attribute of an instance or of a Python module."""

    namespace: dict[str, Any]
    """``vars()`` of its owner."""
    name: str
    plain: Any
    """``ABSENT`` where the owner had none."""
    fused: Any

    def set(self, value: Any) -> None:
        if value is ABSENT:
            self.namespace.pop(self.name, None)
        else:
            self.namespace[self.name] = value


class Exchange:
    """All that is exchanged in one model."""

    def __init__(self, changes: Iterable[Change] = ()):
        self.changes = tuple(changes)

    def on(self) -> None:
        for change in self.changes:
            change.set(change.fused)

    def off(self) -> None:
        for change in self.changes:
            change.set(change.plain)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Everything as it was, for a while."""
        self.off()
        try:
            yield
        finally:
            self.on()
