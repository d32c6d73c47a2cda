"""Where rows come from: a data file, a folder of data files, a folder saved by ``datasets``, or a dataset on the Hub.

Splits. A single file is one split, whatever known split is asked for, and so are all files of a pattern
(``data/*.jsonl``); those of a folder are in ``splits.py``. A split may be sliced as in ``datasets``: ``train[:1000]``,
``train[90%:]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..errors import RowError, UserError
from ..hub import unreachable
from ..paths import expanded, is_pattern, names_a_path
from .readers import EXTENSIONS, data_extension, read_file
from .splits import files_of_split, matching_files

_SLICED = re.compile(r"(?P<name>[^\[\]+]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


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


class Source:
    """The rows of one split, in order; can be iterated again."""

    def __init__(
        self, name: str, rows: Callable[[], Iterator[Row]], start: str | None, stop: str | None, max_rows: int | None
    ):
        self.name = name
        self._rows = rows
        self._start = start
        self._stop = stop
        self._max_rows = max_rows

    def __iter__(self) -> Iterator[Row]:
        return islice(self._slice(), self._max_rows)

    def _slice(self) -> Iterator[Row]:
        start, stop = self._start, self._stop
        if not start and not stop:
            return self._rows()
        if any(bound and (bound.endswith("%") or bound.startswith("-")) for bound in (start, stop)):
            count = sum(1 for _ in self._rows())
            first, last, _ = slice(_bound(start, count), _bound(stop, count)).indices(count)
            return islice(self._rows(), first, max(first, last))
        return islice(self._rows(), int(start or 0), int(stop) if stop else None)


def _bound(text: str | None, count: int) -> int | None:
    if not text:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)


def has_no_splits(name: str | tuple[str, ...], files: tuple[str, ...] = ()) -> bool:
    """Whether a dataset is files that are named here, all of which are read for any split.

    Args:
        files: as ``open_source`` takes them.
    """
    if isinstance(name, tuple):
        return True
    path = expanded(name)
    return path.is_file() or (not is_hub_name(name) and (bool(files) or (is_pattern(name) and not path.exists())))


def is_hub_name(name: str | tuple[str, ...]) -> bool:
    """Whether a dataset name can only be one of the Hub: there is no such path, and it does not look like one."""
    return isinstance(name, str) and not (names_a_path(name) or data_extension(expanded(name)))


def open_source(
    name: str | tuple[str, ...],
    *,
    split: str = "train",
    config: str | None = None,
    max_rows: int | None = None,
    tolerant: bool = False,
    option: str = "data.dataset_name",
    files: tuple[str, ...] = (),
) -> Source:
    """Open one split of a dataset.

    Args:
        name: a data file, a pattern of files, a list of those, a folder, or a dataset on the Hub; a path that exists
            wins over a Hub name.
        split: split name, possibly sliced.
        config: configuration of a Hub dataset or of a folder.
        max_rows: read no more than the first rows of the split.
        tolerant: yield unreadable rows of a file with their fault, and read on, as ``read_file`` does.
        option: what the name is the value of, for messages.
        files: files or patterns below a folder, or in a Hub dataset, that are read instead of all of the split.

    Raises:
        UserError: nothing there, no such split, or an unknown kind of file. Faults inside a file are raised when its
            rows are read.
    """
    match = _SLICED.fullmatch(split)
    if match is None:
        raise UserError(f"{name}: split {split!r} is not understood; write a name or a slice such as train[:1000]")
    if is_hub_name(name):
        assert isinstance(name, str)
        rows = _hub_rows(name, match["name"], config, files)
    elif isinstance(name, tuple) or files or (is_pattern(name) and not expanded(name).exists()):
        rows = _rows_of(_listed_files(name, files, match["name"], config, option), tolerant)
    else:
        rows = _local_rows(_existing(name, option), match["name"], config, tolerant)
    shown = name if isinstance(name, str) else f"{name[0]} and {len(name) - 1} more" if len(name) > 1 else name[0]
    return Source(shown, rows, match["start"], match["stop"], max_rows)


def _existing(name: str, option: str) -> Path:
    path = expanded(name)
    if not path.exists():
        raise UserError(f"{option}={name} does not exist: give a data file, a folder of them, or a Hub id")
    return path


def _listed_files(
    name: str | tuple[str, ...], files: tuple[str, ...], split: str, config: str | None, option: str
) -> list[Path]:
    """The files of a list, or of a folder, in its order; each may be a pattern."""
    if files:
        assert isinstance(name, str)
        folder = _existing(name, option)
        if not folder.is_dir():
            raise UserError(f"data_files are below a folder, or in a Hub dataset, but {option}={name} is a file")
        # Which files are read is said, so that a configuration of the folder decides nothing.
        config = None
        name = tuple(str(folder / file) for file in files)
    found: list[Path] = []
    for one in (name,) if isinstance(name, str) else name:
        if is_hub_name(one):
            raise UserError(
                f"{option}: {one} in a list is no file here; several sets of the Hub are a mixture (data.datasets)"
            )
        found += matching_files(one) if is_pattern(one) and not expanded(one).exists() else [_existing(one, option)]
    if folders := [path for path in found if path.is_dir()]:
        raise UserError(f"{option}: {folders[0]} in a list is a folder; name its files, such as {folders[0]}/*.jsonl")
    for path in found:
        files_of_split(path, split, config)
    if twice := next((path for path in found if found.count(path) > 1), None):
        raise UserError(f"{option}: {twice} is listed twice; remove it once")
    return found


def _local_rows(path: Path, split: str, config: str | None, tolerant: bool) -> Callable[[], Iterator[Row]]:
    if path.is_dir() and any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _saved_rows(path, split)
    return _rows_of(files_of_split(path, split, config), tolerant)


def _rows_of(files: list[Path], tolerant: bool) -> Callable[[], Iterator[Row]]:
    for file in files:
        if data_extension(file) is None:
            known = ", ".join(EXTENSIONS)
            raise UserError(f"{file}: unknown kind of data file; expected {known}, each also with .gz")

    def rows() -> Iterator[Row]:
        index = 0
        for file in files:
            for row in read_file(file, tolerant=tolerant):
                yield Row(index, row.data, str(row.file), row.line, row.fault)
                index += 1

    return rows


def _dataset_rows(dataset, name: str) -> Callable[[], Iterator[Row]]:
    return lambda: (Row(index, data, name) for index, data in enumerate(dataset))


def _saved_rows(path: Path, split: str) -> Callable[[], Iterator[Row]]:
    """A folder written by ``datasets``' ``save_to_disk``."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} was saved by datasets but does not load: {_first_line(error)}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(sorted(dataset))}")
        dataset = dataset[split]
    return _dataset_rows(dataset, str(path))


def _hub_rows(name: str, split: str, config: str | None, files: tuple[str, ...] = ()) -> Callable[[], Iterator[Row]]:
    import datasets

    wanted = f"dataset {name}" + (f" ({config})" if config else "") + f", split {split}"
    away = None if datasets.config.HF_HUB_OFFLINE else unreachable(datasets.config.HF_ENDPOINT)
    try:
        with _offline() if away else nullcontext():
            dataset = datasets.load_dataset(name, config, split=split, **({"data_files": list(files)} if files else {}))
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        if away:
            raise UserError(
                f"{wanted}: there is no such path here, it is not in the cache of datasets "
                f"({datasets.config.HF_DATASETS_CACHE}), and {datasets.config.HF_ENDPOINT} cannot be reached: {away}; "
                "check the path, or the connection"
            ) from error
        raise UserError(
            f"{wanted}: there is no such path here, and the Hub or its cache gave: {_first_line(error)}; "
            "check the name, or download it once while online"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{wanted} does not load: {_first_line(error)}") from error
    return _dataset_rows(dataset, name)


@contextmanager
def _offline() -> Iterator[None]:
    """Let ``datasets`` look into its cache at once, and not after its retries."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
