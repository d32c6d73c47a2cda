"""The values of a file of another trainer, read as TRL reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .fields import show


class TrlFile:
    """The keys of a file that nobody has taken yet.

    Every reader takes its key out, and raises a ``UserError`` for a value of the wrong kind.

    Args:
        lines: where the file has a key.
        names: what the file calls a key, where that is not its name here.
    """

    def __init__(
        self,
        source: str,
        keys: dict[str, Any],
        lines: Mapping[str, int] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.keys = source, keys
        self.lines, self.names = dict(lines or {}), dict(names or {})

    def where(self, key: str) -> str:
        """File, line and the file's name of a key, for messages."""
        name = self.names.get(key, key)
        line = f", line {self.lines[name]}" if name in self.lines else ""
        return f"{self.source}{line}: {name}"

    def take(self, key: str, default: Any = None) -> Any:
        """The value as YAML gives it."""
        return self.keys.pop(key, default)

    def number(self, key: str, default: float | None) -> float:
        """A number; null counts as ``default``."""
        value = self.keys.pop(key, None)
        return self.as_number(key, default if value is None else value)

    def as_number(self, key: str, value: Any) -> float:
        """``value`` of ``key`` as a number."""
        try:
            # YAML 1.1 takes 5e-7 for a string, and TRL reads that as a number, too
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{self.where(key)}: expected a number, got {show(value)}") from None

    def whole(self, key: str, default: int) -> int:
        """A positive integer."""
        return self.as_whole(key, self.take(key, default))

    def as_whole(self, key: str, value: Any) -> int:
        """``value`` of ``key`` as a positive integer."""
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where(key)}: expected a positive integer, got {show(value)}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where(key)}: expected true or false, got {show(value)}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping, also as JSON text; null is an empty one."""
        value = self.take(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise UserError(f"{self.where(key)}: expected a mapping or JSON, got {show(value)}") from None
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.where(key)}: expected a mapping, got {show(value)}")
        return dict(value or {})
