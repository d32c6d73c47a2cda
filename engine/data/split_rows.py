"""The rows of one split, which can be read on from any place that was reached, without reading what is before again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import RowError, UserError
from .readers import EXTENSIONS, data_extension, read_file

Place = list[Any]
"""JSON values: where the next row is. Its last item is the index of that row."""


class Turns(Protocol):
    """How turns of conversations are written, and read (``turns.TurnForm``)."""

    removes_none: bool

    def turns(self, value: Any, row: Row, name: str) -> list[dict[str, Any]]:
        """The messages of a column."""


@dataclass(frozen=True, slots=True)
class Row:
    """One source row."""

    index: int
    """0-based, over all files of the split and before slicing."""
    data: dict[str, Any]
    file: str
    """The file, or the dataset's name where there is no file."""
    line: int | None = None
    fault: RowError | None = None
    """Why there is no data, where the source was asked to read on after such rows."""
    form: Turns | None = None
    """How its turns are written; None is role/content or from/value."""
    mapped: frozenset[str] = frozenset()
    """The parts whose column ``data.columns`` names."""

    @property
    def where(self) -> str:
        """For messages: file, row and, where there is one, line."""
        return f"{self.file}, row {self.index}" + (f" (line {self.line})" if self.line is not None else "")


class SplitRows(Protocol):
    """The rows of a split, in order. Called without a place, it begins at the first."""

    @property
    def place(self) -> Place:
        """Where the row after the last one that was given is. Of the iteration that was begun last."""

    @property
    def count(self) -> int | None:
        """How many there are, where that is known before they are read."""

    @property
    def files(self) -> Sequence[Path] | None:
        """The files whose content the rows are; None where that is not known."""

    def __call__(self, place: Place | None = None) -> Iterator[Row]: ...


class FileRows:
    """Rows of local files. A place is the file, the row in it, and the row of the split.

    Raises:
        UserError: a file of an unknown kind.
    """

    def __init__(self, files: list[Path], *, tolerant: bool = False):
        for file in files:
            if data_extension(file) is None:
                known = ", ".join(EXTENSIONS)
                raise UserError(f"{file}: unknown kind of data file; expected {known}, each also with .gz")
        self.files, self._tolerant = files, tolerant
        self.place: Place = [0, 0, 0]
        self.count = None

    def __call__(self, place: Place | None = None) -> Iterator[Row]:
        first, inside, index = place or (0, 0, 0)
        for number, file in enumerate(self.files[first:], start=first):
            for row in read_file(file, tolerant=self._tolerant, skip=inside):
                inside += 1
                self.place = [number, inside, index + 1]
                yield Row(index, row.data, str(row.file), row.line, row.fault)
                index += 1
            inside = 0


class StoredRows:
    """Rows of a dataset on this disk, which ``datasets`` reads row by row. A place is the row."""

    def __init__(self, dataset: Any, name: str):
        self._dataset, self._name = dataset, name
        self.files = [Path(entry["filename"]) for entry in dataset.cache_files] or None
        self.place: Place = [0]
        self.count = len(dataset)

    def __call__(self, place: Place | None = None) -> Iterator[Row]:
        (first,) = place or (0,)
        for index, data in enumerate(self._dataset.skip(first) if first else self._dataset, start=first):
            self.place = [index + 1]
            yield Row(index, data, self._name)


class StreamedRows:
    """Rows of an ``IterableDataset``. A place is its own state, and the row.

    Args:
        explain: what is said of one of ``errors``, which become a ``UserError`` that names the row.
        count: how many rows there are, where that is known.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        explain: Callable[[Exception], str],
        errors: tuple[type[Exception], ...],
        *,
        count: int | None = None,
    ):
        self._dataset, self._name, self.count = dataset, name, count
        self.files = None
        self._explain, self._errors = explain, errors
        self._start = dataset.state_dict()
        self._index = 0

    @property
    def place(self) -> Place:
        """Asked for between windows alone: the state is copied."""
        return [self._dataset.state_dict(), self._index]

    def __call__(self, place: Place | None = None) -> Iterator[Row]:
        # A state that was loaded would hold for the next pass, too.
        state, self._index = place or (self._start, 0)
        self._dataset.load_state_dict(state)
        try:
            for data in self._dataset:
                self._index += 1
                yield Row(self._index - 1, data, self._name)
        except self._errors as error:
            raise UserError(f"{self._name}, row {self._index}: the stream ended: {self._explain(error)}") from error
