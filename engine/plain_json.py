"""JSON that every reader takes: the standard has no NaN and no infinity, which Python writes by these names.

What people and other programs read has null in their place. What a run reads back itself keeps them: ``exact_json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

_MARK = "not_finite"
"""The one key of the object that stands for a number which is not finite."""


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True) -> str:
    """``value`` as JSON, with null for every number that is not finite.

    Raises:
        TypeError: it holds something that JSON does not know.
    """
    return _dumps(value, lambda number: None, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii)


def exact_json(value: Any, *, indent: int | None = None) -> str:
    """``value`` as JSON from which ``read_exact_json`` gives it back, numbers that are not finite, too."""
    return _dumps(value, lambda number: {_MARK: str(number)}, indent=indent)


def read_exact_json(text: str) -> Any:
    """What ``exact_json`` wrote, or ``json.dumps``."""
    return json.loads(text, object_hook=lambda found: float(found[_MARK]) if list(found) == [_MARK] else found)


def _dumps(value: Any, stand_in: Callable[[float], Any], **options: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value, stand_in), allow_nan=False, **options)


def _finite(value: Any, stand_in: Callable[[float], Any]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return stand_in(value)
    if isinstance(value, Mapping):
        return {key: _finite(item, stand_in) for key, item in value.items()}
    return [_finite(item, stand_in) for item in value] if isinstance(value, list | tuple) else value
