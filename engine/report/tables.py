"""Values as a reader sees them: settings, tables of metrics with words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..digits import ERROR, with_error
from ..run_folder import AS_TRAINED, eval_prefixes
from .words import words_of


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
