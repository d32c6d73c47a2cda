"""Preference rows from files or the Hub, recognised, tokenised, linted. Names are imported when they are asked for: a
page about rows that were read needs no more than the words for their problems."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .groups import PreferenceDataset, PreferenceGroup
    from .lint import LintReport
    from .read import check_files, load_dataset_groups, open_rows
    from .sets import Report
    from .sources import Row

_PLACES = {
    "groups": ("PreferenceDataset", "PreferenceGroup"),
    "lint": ("LintReport",),
    "read": ("check_files", "load_dataset_groups", "open_rows"),
    "sets": ("Report",),
    "sources": ("Row",),
}

__all__ = [
    "LintReport",
    "PreferenceDataset",
    "PreferenceGroup",
    "Report",
    "Row",
    "check_files",
    "load_dataset_groups",
    "open_rows",
]


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
