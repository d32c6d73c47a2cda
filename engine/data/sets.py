"""The sets that a split is read from, one or those of a mixture, and what lint found in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..config.mixture import labels_of
from ..config.schema import DataConfig, DatasetConfig
from ..errors import UserError, raise_all
from .lint import LintReport
from .sources import Source, has_no_splits, is_hub_name, open_source

Split = str
"""``train``, or one of ``DataConfig.eval_splits``: ``eval``, or ``eval_NAME`` of several."""
_OWN = ("format", "columns", "turn_fields", "roles", "system")
"""Settings of ``data`` that a set of a mixture may have of its own."""


@dataclass(frozen=True)
class DataSet:
    """One set of a split."""

    data: DataConfig
    """How its rows are read."""
    split: Split
    name: str | tuple[str, ...]
    part: str
    """The split of the set, possibly sliced."""
    config: str | None
    option: str
    """Where the name stands in the configuration, for messages."""
    label: str = ""
    """What it is called in a mixture."""
    files: tuple[str, ...] = ()
    """See ``DatasetConfig.data_files``."""

    @property
    def on_hub(self) -> bool:
        """Whether it can only be on the Hub, so that it is not looked for before it is read."""
        return is_hub_name(self.name)

    def open(self, *, tolerant: bool = False) -> Source:
        """The rows as they are in the source.

        Raises:
            UserError: they are not there.
        """
        source = open_source(
            self.name,
            split=self.part,
            config=self.config,
            max_rows=self.data.max_rows,
            tolerant=tolerant,
            option=self.option,
            files=self.files,
            streaming=self.data.streaming,
        )
        if self.label:
            source.name = f"{self.label} ({source.name})"
        return source


def sets_of(data: DataConfig, split: Split) -> list[DataSet]:
    """The sets of a split, in the order of the configuration.

    Raises:
        UserError: there is no such data.
    """
    train = split == "train" or data.eval_fraction is not None
    dataset, part = data.eval_source(split)
    if not train and dataset is not None:
        option = "data.eval_dataset_name" + ("" if split == "eval" else f".{split.removeprefix('eval_')}")
        return [DataSet(data, split, dataset, part, None, option)]
    if data.datasets:
        labels = zip(data.datasets, labels_of(data.datasets), strict=True)
        found = [_of_mixture(data, split, one, label) for one, label in labels if train or one.eval_split is not None]
        if not found:
            raise UserError(
                "there is no evaluation data: give sets of data.datasets an eval_split, or set data.eval_dataset_name, "
                "or data.eval_fraction"
            )
        return found
    name = data.dataset_name
    assert name is not None
    if not train and has_no_splits(name):
        raise UserError(
            f"there is no evaluation data: data.dataset_name={name} is read whole, without splits; "
            "set data.eval_dataset_name, or data.eval_fraction"
        )
    own = data.dataset_train_split if train else part
    return [DataSet(data, split, name, own, data.dataset_config, "data.dataset_name")]


def _of_mixture(data: DataConfig, split: Split, one: DatasetConfig, label: str) -> DataSet:
    own = {key: value for key in _OWN if (value := getattr(one, key)) is not None}
    part = one.split if split == "train" or one.eval_split is None else one.eval_split
    option = f"data.datasets: {label}: name"
    if split != "train" and one.eval_split is not None and "[" not in part and has_no_splits(one.name, one.data_files):
        raise UserError(
            f"data.datasets: {label}: eval_split {part} is of files that are read whole, without splits: give slices, "
            "such as split train[:90%] and eval_split train[90%:], or a folder that has splits"
        )
    return DataSet(replace(data, **own), split, one.name, part, one.config, option, label, one.data_files)


def with_rows(reports: Sequence[LintReport], data: DataConfig, split: Split) -> Sequence[LintReport]:
    """Those of the sets of a split that must have rows: where one is split by prompts, a small set may hold out none,
    but not all of them."""
    found = [report for report in reports if report.total]
    return found if found and split != "train" and data.eval_fraction is not None else reports


class MixtureReport:
    """What lint found in the sets of a mixture: a report for each, and their sums."""

    def __init__(self, parts: Mapping[str, LintReport]):
        self.parts = parts
        """By label."""

    @property
    def total(self) -> int:
        return sum(report.total for report in self.parts.values())

    @property
    def kept(self) -> int:
        return sum(report.kept for report in self.parts.values())

    @property
    def dropped(self) -> int:
        return sum(report.dropped for report in self.parts.values())

    def of(self, source: str) -> LintReport:
        """That of one set."""
        return self.parts[source]

    def raise_if_strict(self, strict: bool) -> None:
        """As ``LintReport.raise_if_strict``, for all sets at once."""
        raise_all(partial(report.raise_if_strict, strict) for report in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """For ``data.json``: the sums, and under ``sources`` the report of each set."""
        sums = {"source": "all sets", "total": self.total, "kept": self.kept, "dropped": self.dropped}
        return {**sums, "sources": {label: report.to_dict() for label, report in self.parts.items()}}


Report = LintReport | MixtureReport
