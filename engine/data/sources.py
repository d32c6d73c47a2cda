"""Where rows come from: a data file, a folder of data files, a folder saved by ``datasets``, or a dataset on the Hub.

Splits. A single file is one split, whatever known split is asked for, and so are all files of a pattern
(``data/*.jsonl``); those of a folder are in ``splits.py``. A split may be sliced as in ``datasets``: ``train[:1000]``,
``train[90%:]``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow

from ..errors import UserError
from ..hub import unreachable
from ..paths import expanded, is_pattern, names_a_path
from .readers import EXTENSIONS, data_extension
from .split_rows import FileRows, Place, Row, SplitRows, StoredRows, StreamedRows
from .splits import files_of_split, matching_files

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""By extension, what ``datasets`` reads such files with."""
_SLICED = re.compile(r"(?P<name>[^\[\]+]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class Source:
    """The rows of one split, in order; can be iterated again."""

    def __init__(self, name: str, rows: SplitRows, start: str | None, stop: str | None, max_rows: int | None):
        self.name = name
        self._rows = rows
        self._start = start
        self._stop = stop
        self._max_rows = max_rows

    @property
    def files(self) -> Sequence[Path] | None:
        """The files whose content the rows are; None where that is not known."""
        return self._rows.files

    def __iter__(self) -> Iterator[Row]:
        return islice(self._slice(), self._max_rows)

    def _slice(self) -> Iterator[Row]:
        start, stop = self._start, self._stop
        if not start and not stop:
            return self._rows()
        if self._needs_count:
            count = sum(1 for _ in self._rows())
            first, last, _ = slice(_bound(start, count), _bound(stop, count)).indices(count)
            return islice(self._rows(), first, max(first, last))
        return islice(self._rows(), int(start or 0), int(stop) if stop else None)

    @property
    def _needs_count(self) -> bool:
        return any(bound and (bound.endswith("%") or bound.startswith("-")) for bound in (self._start, self._stop))

    @property
    def place(self) -> Place:
        """Where the row after the last one that ``read_on`` has given is."""
        return self._rows.place

    @property
    def count(self) -> int | None:
        """How many rows there are, where that is known before they are read."""
        if self._rows.count is None or self._needs_count:
            return None
        first, last, _ = slice(int(self._start or 0), int(self._stop) if self._stop else None).indices(self._rows.count)
        return min(max(last - first, 0), self._max_rows or last)

    def read_on(self, place: Place | None = None) -> Iterator[Row]:
        """The rows from a place on that was reached before; without one, all.

        Raises:
            UserError: a slice that the number of all rows is needed for.
        """
        if self._needs_count:
            raise UserError(
                f"{self.name}: data.streaming reads rows once, so their number is not known: write the slice with row "
                "numbers, such as train[:100000]"
            )
        first, ends = int(self._start or 0), [int(self._stop)] if self._stop else []
        end = min([*ends, *([first + self._max_rows] if self._max_rows is not None else [])], default=None)
        begun = place[-1] if place else 0
        return islice(self._rows(place), max(first - begun, 0), None if end is None else max(end - begun, 0))


def _bound(text: str | None, count: int) -> int | None:
    if not text:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)


def has_no_splits(name: str | tuple[str, ...], files: tuple[str, ...] = ()) -> bool:
    """Whether a dataset is files that are named here, all of which are read for any split.

    Args:
        files: as ``open_source`` takes them.
    """
    if isinstance(name, tuple) or addresses_of(name):
        return True
    path = expanded(name)
    return path.is_file() or (not is_hub_name(name) and (bool(files) or (is_pattern(name) and not path.exists())))


def addresses_of(name: str | tuple[str, ...]) -> list[str]:
    """The addresses such as https://... that a dataset name is; empty for any other."""
    names = (name,) if isinstance(name, str) else name
    return list(names) if all(_ADDRESS.match(one) for one in names) else []


def is_hub_name(name: str | tuple[str, ...]) -> bool:
    """Whether a dataset name is not looked for on this machine: it is an address, or there is no such path and it does
    not look like one."""
    if isinstance(name, tuple) or addresses_of(name):
        return bool(addresses_of(name))
    return not (names_a_path(name) or data_extension(expanded(name)))


def open_source(
    name: str | tuple[str, ...],
    *,
    split: str = "train",
    config: str | None = None,
    max_rows: int | None = None,
    tolerant: bool = False,
    option: str = "data.dataset_name",
    files: tuple[str, ...] = (),
    streaming: bool = False,
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
        streaming: a Hub dataset is not downloaded, and addresses are read.

    Raises:
        UserError: nothing there, no such split, or an unknown kind of file. Faults inside a file are raised when its
            rows are read.
    """
    match = _SLICED.fullmatch(split)
    if match is None:
        raise UserError(f"{name}: split {split!r} is not understood; write a name or a slice such as train[:1000]")
    rows: SplitRows
    if addresses := addresses_of(name):
        if not streaming:
            raise UserError(f"{option}={addresses[0]} is an address: set data.streaming to true, or download it")
        rows = _address_rows(addresses, match["name"], config)
    elif is_hub_name(name):
        assert isinstance(name, str)
        rows = _hub_rows(name, match["name"], config, files, streaming=streaming)
    elif isinstance(name, tuple) or files or (is_pattern(name) and not expanded(name).exists()):
        rows = FileRows(_listed_files(name, files, match["name"], config, option), tolerant=tolerant)
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


def _local_rows(path: Path, split: str, config: str | None, tolerant: bool) -> SplitRows:
    if path.is_dir() and any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _saved_rows(path, split)
    return FileRows(files_of_split(path, split, config), tolerant=tolerant)


def _saved_rows(path: Path, split: str) -> SplitRows:
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
    return StoredRows(dataset, str(path))


def _hub_rows(
    name: str, split: str, config: str | None, files: tuple[str, ...] = (), *, streaming: bool = False
) -> SplitRows:
    import datasets

    wanted = f"dataset {name}" + (f" ({config})" if config else "") + f", split {split}"
    away = None if datasets.config.HF_HUB_OFFLINE else unreachable(datasets.config.HF_ENDPOINT)
    options: dict[str, Any] = {"data_files": list(files)} if files else {}
    options |= {"streaming": True} if streaming else {}
    try:
        with _offline() if away else nullcontext():
            dataset = datasets.load_dataset(name, config, split=split, **options)
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
    except _load_errors() as error:
        raise UserError(f"{wanted} does not load: {_first_line(error)}") from error
    if not streaming:
        return StoredRows(dataset, name)
    known = (dataset.info.splits or {}).get(split)
    return StreamedRows(dataset, name, _first_line, _load_errors(), count=known and known.num_examples)


def _address_rows(addresses: list[str], split: str, config: str | None) -> SplitRows:
    """Files that fsspec reads: https://, s3://, hf:// and so on."""
    import datasets

    if split != "train" or config is not None:
        raise UserError(f"{addresses[0]} is read whole, without splits and configurations; ask for train")
    kinds = {_BUILDERS.get(data_extension(Path(address)) or "") for address in addresses}
    kind = kinds.pop()
    if kind is None or kinds:
        raise UserError(f"{addresses[0]}: expected addresses of one kind of file: {', '.join(EXTENSIONS)}")
    separator = {"sep": "\t"} if addresses[0].removesuffix(".gz").endswith(".tsv") else {}
    errors: tuple[type[Exception], ...] = (*_load_errors(), ImportError)
    try:
        dataset = datasets.load_dataset(kind, data_files=addresses, split=split, streaming=True, **separator)
    except errors as error:
        raise UserError(f"{addresses[0]} cannot be read: {_first_line(error)}") from error
    return StreamedRows(dataset, addresses[0], _first_line, _load_errors())


def _load_errors() -> tuple[type[Exception], ...]:
    """What ``datasets`` raises on data that it cannot load or read on."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # Where a connection is lost on the way: of the library that the client of the Hub has, and of fsspec's.
    own = ("builtins", "huggingface_hub")
    connections = [kind for kind in HfHubHTTPError.__mro__ if kind.__module__.partition(".")[0] not in own]
    if "aiohttp" in sys.modules:
        connections.append(sys.modules["aiohttp"].ClientError)
    return (
        OSError,
        ValueError,
        RuntimeError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        *connections,
    )


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
