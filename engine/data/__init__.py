"""Preference rows from files or the Hub, recognised, tokenised, linted."""

from .groups import PreferenceDataset, PreferenceGroup
from .lint import LintReport
from .read import check_files, load_dataset_groups, open_rows
from .sets import Report
from .sources import Row

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
