"""Data sets that are never whole in memory or on disk: groups come in windows, which are read one after the other.

A window has as many groups as were asked for, whatever lint drops, so that it is a whole number of optimizer steps. A
set that ends begins again; only a set that ends within its first window makes that the window, and every later one,
so that windows are epochs. Where the next window begins is a few JSON values, from which it is read again exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from ..config.schema import DataConfig, RunConfig
from ..errors import UserError, raise_all
from .copies import Copies
from .groups import PreferenceDataset, PreferenceGroup
from .lint import LintReport
from .lost_text import LostText
from .make_groups import ROWS_PER_CALL, make_groups, read_examples
from .mixture import shared_out
from .problems import LOST
from .rows import RowReader
from .sets import DataSet, MixtureReport, Report, sets_of
from .sources import Row
from .tokenize import Encoder

NO_LENGTH = (
    "train.max_steps is missing: rows of data.streaming are not counted before they are read, so the length of the run "
    "must be said in steps"
)


def window_size(config: RunConfig) -> int:
    """Rows of a window: ``data.stream_window``, in whole optimizer steps."""
    step = config.packing.pairs_per_step
    return max(config.data.stream_window // step, 1) * step


class Window(NamedTuple):
    """Groups that are planned together."""

    dataset: PreferenceDataset
    report: Report
    """What lint found in the rows of this window alone."""
    after: list[Any]
    """JSON values: where the next window begins (``WindowStream.seek``)."""


class WindowStream:
    """The windows of the training data.

    Args:
        size: groups of a window; of a mixture they are shared out by ``weight``.

    Raises:
        UserError: the data cannot be opened, or not read in windows.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, *, size: int):
        sets = sets_of(data, "train")
        weights = [one.weight or 0.0 for one in data.datasets] or [1.0]
        if len(sets) > size:
            raise UserError(f"data.stream_window: a window of {size} rows has none of some of the {len(sets)} sets")
        self._strict = data.strict
        self._sets = [_SetStream(one, tokenizer) for one in sets]
        counts = list(shared_out(size, weights))
        while sum(counts) > size:
            counts[counts.index(max(counts))] -= 1
        self.counts = tuple(counts)
        """Groups of each set in a window."""
        self.rows: int | None = self._sets[0].source.count if len(sets) == 1 else None
        """Rows of the whole stream, those that lint will drop included, where that is known; exact once ``whole``."""
        self.whole = False
        """Whether a window is all there is."""
        self._begun = False

    def next(self) -> Window:
        """The next window; the first decides on the layout of rows.

        Raises:
            UserError: as ``load_dataset_groups``, of the rows of this window.
        """
        # One set may end within the first window, and is all of it then.
        short = not self._begun and len(self._sets) == 1
        reports = {one.label: one.new_report() for one in self._sets}
        groups: list[PreferenceGroup] = []
        for one, count in zip(self._sets, self.counts, strict=True):
            groups += one.take(count, reports[one.label], wrap=not short)
        report: Report = reports[""] if "" in reports else MixtureReport(reports)
        report.raise_if_strict(self._strict)
        if not self._begun:
            raise_all(partial(one.check, reports[one.label]) for one in self._sets)
        self._begun = True
        if short and len(groups) < self.counts[0]:
            self.whole, self.counts, self.rows = True, (len(groups),), len(groups)
        return Window(PreferenceDataset(groups), report, [one.place for one in self._sets])

    def seek(self, after: list[Any]) -> None:
        """Go on where a window of a stream of the same data ended. The first window must have been read."""
        assert self._begun
        for one, place in zip(self._sets, after, strict=True):
            one.seek(place)

    @property
    def files(self) -> list[list[str] | None]:
        """Of each set the names of the files that ``Window.after`` counts; None where it is not a list of files."""
        return [one.files for one in self._sets]

    def close(self) -> None:
        """End what another thread reads, soon."""
        for one in self._sets:
            one.closed = True


class _SetStream:
    """The groups of one set, again and again."""

    def __init__(self, one: DataSet, tokenizer: Any):
        self.label = one.label
        self.source = one.open()
        self._data, self._split = one.data, one.split
        self._encoder = Encoder(tokenizer, one.data)
        self._lost_text = LostText(self._encoder)
        self._read = RowReader(one.data, use_messages=self._encoder.use_messages)
        self._rows: Iterator[Row] = self.source.read_on()
        self._begun = False
        self.closed = False

    @property
    def place(self) -> list[Any]:
        return self.source.place

    @property
    def files(self) -> list[str] | None:
        return None if self.source.files is None else [path.name for path in self.source.files]

    def seek(self, place: list[Any]) -> None:
        self._rows = self.source.read_on(place)

    def new_report(self) -> LintReport:
        return LintReport(self.source.name, counted=LOST if self._data.lost_text == "count" else frozenset())

    def take(self, count: int, report: LintReport, *, wrap: bool) -> list[PreferenceGroup]:
        """The next groups; with ``wrap`` from the beginning again at the end, without it fewer."""
        found: list[PreferenceGroup] = []
        copies, before = Copies(), None if self._begun else 0
        self._begun = True
        while len(found) < count:
            # A row makes one group at most, so none is read that the next window begins with.
            if self.closed:
                raise UserError(f"{self.source.name}: reading was ended")
            rows = list(islice(self._rows, min(ROWS_PER_CALL, count - len(found))))
            if not rows:
                if before == len(found):
                    report.raise_if_empty()
                    raise UserError(f"{self.source.name}: none of its rows can be used; see `dpo check`")
                # What comes again is no copy.
                self._rows, copies, before = self.source.read_on(), Copies(), len(found)
                if not wrap:
                    break
            examples = read_examples(rows, self._data, self._read, report, self._split)
            options: dict[str, Any] = {"report": report, "copies": copies, "lost_text": self._lost_text}
            made = make_groups(examples, self._encoder, max_length=self._data.max_length, **options)
            found += (replace(group, source=self.label) for group in made) if self.label else made
        return found

    def check(self, report: LintReport) -> None:
        """What can be said of the rows of a first window."""
        report.raise_if_empty()
        report.raise_if_promptless()
        if absent := self._read.absent_column():
            raise absent[0]
