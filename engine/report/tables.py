"""Values as a reader sees them: numbers with the digits that mean something, settings, tables of metrics with words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..run_folder import AS_TRAINED, eval_prefixes
from .words import words_of

ERROR = "_se"
"""Ends the name of a standard error, behind the name of its metric."""
_MOST_DECIMALS = 4


def metric_rows(columns: Sequence[Mapping[str, Any]], unit: str) -> list[dict[str, Any]]:
    """A row for each metric of evaluations, a standard error beside its value.

    Args:
        columns: metrics by name, which begins with ``eval_``.
        unit: ``pairs`` or ``rows``.
    """
    names = list(dict.fromkeys(name for column in columns for name in column if name.startswith("eval_")))
    prefixes = sorted(eval_prefixes(names) or ["eval_"], key=len, reverse=True)
    rows = []
    for name in names:
        if name.endswith(ERROR) and name.removesuffix(ERROR) in names:
            continue
        rounded = name.startswith(AS_TRAINED)
        prefix = AS_TRAINED if rounded else next((p for p in prefixes if name.startswith(p)), "eval_")
        words = words_of(name.removeprefix(prefix), unit)
        values = [with_error(name, column.get(name), column.get(name + ERROR)) for column in columns]
        rows.append(
            {
                "name": name.removeprefix("eval_"),
                "words": f"before rounding: {words}" if rounded and words else words,
                "values": values,
            }
        )
    return rows


def with_error(name: str, value: Any, error: Any) -> str:
    """A value with its standard error, to two digits of the latter; a value alone."""
    if not (_is_finite(value) and _is_finite(error)) or error == 0:
        return shown(name, value)
    decimals = min(max(1 - math.floor(math.log10(error)), 0), _MOST_DECIMALS)
    # A narrow screen may break the line before the sign, and not behind it.
    return f"{value:,.{decimals}f} ±\u00a0{error:,.{decimals}f}"


def shown(name: str, value: Any) -> str:
    """The value of a metric. Counts are logged as floats; here they become whole again."""
    counts = "num_" in name or "count/" in name
    return shown_number(int(value) if counts and isinstance(value, float) and value.is_integer() else value)


def shown_number(value: Any) -> str:
    """Four digits that mean something, at most four of them behind the point; counts whole."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:,.{min(max(3 - math.floor(math.log10(abs(value))), 0), _MOST_DECIMALS)}f}"


def shown_setting(value: Any) -> str:
    """The value of a key of a configuration."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown_setting(item) for item in value) or "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={shown_setting(item)}" for key, item in value.items())
    return str(value)


def flat_config(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every key of a configuration, dotted, and its value."""
    return {name: value for section, values in config.items() for name, value in _flat(values, section)}


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        key = f"{prefix}.{name}"
        flat.extend(_flat(value, key) if isinstance(value, dict) and value else [(key, value)])
    return flat


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
