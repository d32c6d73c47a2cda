"""Values of an Arrow column: JSON that is stored as text is decoded, and a cell that is no value says why.

A column may hold what no Python value can be, such as a date past the year 9999, and never be read; so a cell that
cannot be converted is no error before its column is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow

_JSON = b"arrow.json"
Decode = Callable[[Any], Any]


@dataclass(frozen=True)
class Unreadable:
    """A cell that its file holds and that is no value, such as text that is not UTF-8."""

    reason: str


def cells(column: pyarrow.Array, field: pyarrow.Field) -> list[Any]:
    """The values of a column in Python; ``Unreadable`` where there is none."""
    decode = _decoder(field)
    try:
        values = column.to_pylist()
        return values if decode is None else [decode(value) for value in values]
    except (ValueError, OverflowError, RecursionError, pyarrow.ArrowException):
        return [_cell(scalar, decode) for scalar in column]


def _cell(scalar: pyarrow.Scalar, decode: Decode | None) -> Any:
    try:
        value = scalar.as_py()
        return value if decode is None else decode(value)
    except UnicodeDecodeError:
        return Unreadable("holds text that is not UTF-8")
    except json.JSONDecodeError as error:
        return Unreadable(f"holds broken JSON: {error.msg}")
    except (ValueError, OverflowError, RecursionError, pyarrow.ArrowException) as error:
        return Unreadable(f"holds a value that cannot be read ({str(error).splitlines()[0]})")


def _decoder(field: pyarrow.Field) -> Decode | None:
    """What turns JSON text inside the values of a column into what it stands for; None where there is none."""
    kind = field.type
    extension = (field.metadata or {}).get(b"ARROW:extension:name")
    if extension == _JSON or getattr(kind, "extension_name", None) == _JSON.decode():
        return lambda text: json.loads(text) if isinstance(text, str) else text
    if pyarrow.types.is_struct(kind):
        inner = {kind.field(i).name: _decoder(kind.field(i)) for i in range(kind.num_fields)}
        changed = {name: decode for name, decode in inner.items() if decode is not None}
        return _in_object(changed) if changed else None
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        decode = _decoder(kind.value_field)
        return None if decode is None else lambda items: items and [decode(item) for item in items]
    return None


def _in_object(changed: dict[str, Decode]) -> Decode:
    def decode(value: Any) -> Any:
        if value is None:
            return None
        return value | {name: inner(value[name]) for name, inner in changed.items() if name in value}

    return decode
