"""Rows of one local file: JSON lines, a JSON array, Parquet or CSV, each also gzipped, read without holding the file.

JSON is read here, and not through ``datasets``, so that an error can name its line and a file of many gigabytes never
becomes one object.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

from ..errors import RowError, UserError
from .cells import cells

EXTENSIONS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
CHUNK_CHARS = 1 << 20
PARQUET_ROWS = 1024
_CORRECT = "correct the file there"


class FileRow(NamedTuple):
    """One row of a file. ``line`` is its 1-based line, or None where the format has no lines."""

    file: Path
    line: int | None
    data: dict[str, Any]
    fault: RowError | None = None
    """Why the row cannot be read, where the reader was asked to go on; ``data`` is empty then."""


def data_extension(path: Path) -> str | None:
    """``.jsonl``, ``.parquet`` and so on, without a trailing ``.gz``; None for a file that is no data file."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in EXTENSIONS else None


def read_file(path: Path, *, tolerant: bool = False, skip: int = 0) -> Iterator[FileRow]:
    """Yield the rows of one file in order, without the first ``skip``, which are passed over where that is quick.

    With ``tolerant``, a line or element that is no row is yielded with its fault, and reading goes on where the next
    row can be found: after the line, or after an element of an array that is whole.

    Raises UserError, with file and line, for a file that cannot be opened, is empty, is cut short, or holds something
    else than objects.
    """
    readers: dict[str | None, Callable[[Path, int], Iterator[FileRow]]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
        ".tsv": partial(_read_csv, separator="\t"),
    }
    reader = readers.get(data_extension(path))
    if reader is None:
        known = ", ".join(EXTENSIONS)
        raise UserError(f"{path}: unknown kind of data file; expected {known}, each also with .gz")
    empty = True
    for row in reader(path, skip):
        empty = False
        if row.fault is not None and not tolerant:
            raise row.fault
        yield row
    if empty and not skip:
        raise UserError(f"{path} holds no rows")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. Faults of the file system and of gzip, also while reading, become UserError."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as stream:
            yield stream  # type: ignore[misc]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except gzip.BadGzipFile:
        raise UserError(f"{path} is not a gzip file, though its name ends with .gz") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _broken(path: Path, line: int, text: str) -> FileRow:
    return FileRow(path, line, {}, RowError("broken_row", f"{path}, line {line}{text}"))


def _unreadable(error: Exception) -> str:
    """For JSON that is valid, but beyond what the parser takes: a number of thousands of digits, endless nesting."""
    return f": this JSON cannot be read: {str(error).split(':')[0]}; correct the row"


def _object(value: Any, path: Path, line: int) -> FileRow:
    if not isinstance(value, dict):
        return _broken(path, line, f": expected an object with named columns, got {type(value).__name__}")
    return FileRow(path, line, value)


def _read_json_lines(path: Path, skip: int, advice: str = "correct or remove the line") -> Iterator[FileRow]:
    with _opened(path) as stream:
        for line, raw in enumerate(stream, start=1):
            encoding = "utf-8-sig" if line == 1 else "utf-8"
            if skip:
                skip -= bool(raw.decode(encoding, "replace").strip())
                continue
            try:
                text = raw.decode(encoding).strip()
                if text:
                    yield _object(json.loads(text), path, line)
            except UnicodeDecodeError:
                yield _broken(path, line, ": not UTF-8 text; convert the file to UTF-8")
            except json.JSONDecodeError as error:
                yield _broken(path, line, f", column {error.colno}: broken JSON: {error.msg}; {advice}")
            except (ValueError, RecursionError) as error:
                yield _broken(path, line, _unreadable(error))


def _read_json(path: Path, skip: int) -> Iterator[FileRow]:
    """A .json file holds one array of objects or, as many tools write it, one object a line."""
    with _opened(path) as stream:
        head = b""
        while not head.strip() and (block := stream.read(4096)):
            head = block
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return islice(_read_json_array(path), skip, None)
    return _read_json_lines(
        path, skip, advice="correct it; a .json file holds one array of objects, or one object a line"
    )


class _ArrayScanner:
    """A window over the text of a JSON array that can be decoded value by value."""

    def __init__(self, stream: IO[bytes], path: Path):
        self.path = path
        self.text = ""
        self.at = 0
        self._line = 1
        self._counted = 0
        self.ended = False
        self._stream = stream
        self._tail = b""
        self._decoder = json.JSONDecoder()

    def _grow(self) -> None:
        """Drop what was consumed and at least double what is left, so that a long value costs linear time."""
        line = self.here()
        rest = self.text[self.at :]
        block = self._tail + self._stream.read(max(CHUNK_CHARS, len(rest)))
        self.ended = len(block) == len(self._tail)
        try:
            more = block.decode("utf-8")
            self._tail = b""
        except UnicodeDecodeError as error:
            # A character may be cut by the end of the block; anything else is no UTF-8.
            if self.ended or len(block) - error.start > 3:
                line += rest.count("\n") + block.count(b"\n", 0, error.start)
                raise UserError(f"{self.path}, line {line}: not UTF-8 text; convert the file to UTF-8") from None
            more, self._tail = block[: error.start].decode("utf-8"), block[error.start :]
        self.text, self.at, self._counted = rest + more, 0, 0

    def peek(self) -> str:
        """The next character that is not white space, or an empty string at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self._grow()

    def take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            got = repr(found) if found else "the end of the file"
            wanted = " or ".join(repr(c) for c in expected)
            raise UserError(f"{self.path}, line {self.here()}: broken JSON: expected {wanted}, got {got}; {_CORRECT}")
        self.at += 1
        return found

    def here(self) -> int:
        """The 1-based line of the next character."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def value(self) -> Any:
        """Decode the next value of the array, reading on while it may only be cut by the end of the window."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 8
                if self.ended or not cut:
                    line = self.here() + self.text.count("\n", self.at, error.pos)
                    raise UserError(f"{self.path}, line {line}: broken JSON: {error.msg}; {_CORRECT}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path}, line {self.here()}{_unreadable(error)}") from None
            else:
                self.at = end
                return value
            self._grow()


def _read_json_array(path: Path) -> Iterator[FileRow]:
    with _opened(path) as stream:
        scanner = _ArrayScanner(stream, path)
        if scanner.peek() == "\ufeff":
            scanner.at += 1
        scanner.take("[")
        more = scanner.peek() != "]"
        if not more:
            scanner.take("]")
        while more:
            scanner.peek()
            line = scanner.here()
            yield _object(scanner.value(), path, line)
            more = scanner.take(",]") == ","
        if scanner.peek():
            raise UserError(f"{path}, line {scanner.here()}: broken JSON: text after the end of the array; {_CORRECT}")


def _read_csv(path: Path, skip: int, separator: str = ",") -> Iterator[FileRow]:
    return islice(_rows_of_csv(path, separator), skip, None)


def _rows_of_csv(path: Path, separator: str) -> Iterator[FileRow]:
    """Rows of text below a row of column names; an empty cell of a column that has others is empty text."""
    csv.field_size_limit(2**31 - 1)
    with _opened(path) as stream:
        lines = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=separator, strict=True)
        try:
            names = next(lines, [])
            if len(set(names)) < len(names):
                raise UserError(f"{path}, line 1: two columns have one name; {_CORRECT}")
            for cells_of_row in lines:
                if cells_of_row and len(cells_of_row) != len(names):
                    text = f": {len(cells_of_row)} cells for {len(names)} columns; correct or remove the row"
                    yield _broken(path, lines.line_num, text)
                elif cells_of_row:
                    yield FileRow(path, lines.line_num, dict(zip(names, cells_of_row, strict=True)))
        except csv.Error as error:
            raise UserError(f"{path}, line {lines.line_num}: broken CSV: {error}; {_CORRECT}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {lines.line_num + 1}: not UTF-8 text; convert the file to UTF-8") from None


def _read_parquet(path: Path, skip: int) -> Iterator[FileRow]:
    with _opened(path) as stream, tempfile.TemporaryFile() as scratch:
        source: IO[bytes] = stream
        if path.suffix.lower() == ".gz":
            # Parquet is read from its end, which a gzip stream cannot do.
            shutil.copyfileobj(stream, scratch)
            source = scratch
        try:
            file = pyarrow.parquet.ParquetFile(source)
            groups = list(range(file.num_row_groups))
            while groups and skip >= (size := file.metadata.row_group(groups[0]).num_rows):
                groups, skip = groups[1:], skip - size
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups):
                batch, skip = batch.slice(skip), max(skip - len(batch), 0)
                columns = [cells(batch.column(i), field) for i, field in enumerate(batch.schema)]
                for values in zip(*columns, strict=True):
                    yield FileRow(path, None, dict(zip(batch.schema.names, values, strict=True)))
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
