"""How figures are written for people: by one rule in the report, in tables and lines of a terminal, and in model cards.

A figure has four significant digits, as a decimal number from 0.0001 to below a million and with an exponent elsewhere;
counts are whole. Beside its standard error it has the digits that the error leaves it: two of the error's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ERROR = "_se"
"""Ends the name of a standard error, behind the name of its metric."""
_DIGITS, _OF_ERRORS = 4, 2
_SMALLEST, _LARGEST = -4, 5
"""Powers of ten of the first digit of decimal numbers."""
_MOST_DECIMALS = 7


def shown_number(value: Any) -> str:
    """Four significant digits; whole numbers of Python whole, None as ``-``, and words as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    power = _power(value, _DIGITS)
    if not _SMALLEST <= power <= _LARGEST:
        return f"{value:.{_DIGITS - 1}e}"
    return f"{value:,.{max(_DIGITS - 1 - power, 0)}f}"


def shown(name: str, value: Any) -> str:
    """The value of a metric. Counts are logged as floats; here they become whole again."""
    counts = "num_" in name or "count/" in name
    return shown_number(int(value) if counts and isinstance(value, float) and value.is_integer() else value)


def with_error(name: str, value: Any, error: Any) -> str:
    """A value with its standard error, to two digits of the latter; a value alone."""
    if not (_is_finite(value) and _is_finite(error)) or error == 0:
        return shown(name, value)
    decimals = max(_OF_ERRORS - 1 - _power(error, _OF_ERRORS), 0)
    # Plus nothing, so that what is rounded to zero has no sign.
    numbers = [f"{round(number, decimals) + 0.0:,.{decimals}f}" for number in (value, error)]
    if decimals > _MOST_DECIMALS:
        numbers = [shown(name, value), f"{error:.{_OF_ERRORS - 1}e}"]
    # A narrow screen may break the line before the sign, and not behind it.
    return " ±\u00a0".join(numbers)


def figures(values: Mapping[str, Any]) -> dict[str, str]:
    """Metrics in words, by name; a standard error is beside its figure."""
    return {
        name: with_error(name, value, values.get(name + ERROR))
        for name, value in values.items()
        if not (name.endswith(ERROR) and name.removesuffix(ERROR) in values)
    }


def _power(value: float, digits: int) -> int:
    """That of ten of the first digit, once rounded to some digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
