"""Reference log-probs as dataset columns, the form in which other trainers take them and users bring them.

Pairs have ``ref_chosen_logps`` and ``ref_rejected_logps``, rows of ranked responses have ``ref_logps`` in the order of
``responses``. A column holds the *sum* over the completion, so what needs single tokens cannot be served from it.
"""

from __future__ import annotations

import gzip
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.columns import is_scored
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..data.sources import Row
from ..errors import UserError, write_fault
from ..plain_json import to_json

PAIR_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
RANKED_COLUMN = "ref_logps"
RANKING = "ranking"
_FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 1024


def import_columns(dataset: PreferenceDataset) -> list[tuple[float, ...]] | None:
    """Reference log-prob sums that came with the rows: per group one per response; None when no row has any.

    Raises:
        UserError: some rows have them and others do not.
    """
    sums = [group.ref_logps for group in dataset]
    without = next((i for i, s in enumerate(sums) if s is None), None)
    if without is None:
        return [s for s in sums if s is not None]
    if all(s is None for s in sums):
        return None
    raise UserError(
        f"row {dataset[without].label} has no {' and '.join(PAIR_COLUMNS)}, while other rows have: "
        "fill the columns in every row, or remove them to have the log-probs computed"
    )


def check_export_path(path: Path) -> None:
    """Raise a ``UserError`` unless ``path`` can be an export, before hours are spent on what to write there."""
    if _extension(path) is None:
        raise UserError(f"--export {path}: expected a name that ends in {', '.join(_FORMATS)}")
    if path.is_dir():
        raise UserError(f"--export {path} is a folder; give a file name that ends in {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--export {path}: the folder {path.absolute().parent} does not exist; create it first")


def check_export_row(row: Row) -> None:
    """Raise a ``UserError`` when rows of this layout have no columns for references."""
    if RANKING not in row.data and is_scored(row.data):
        raise UserError(
            f"{row.where}: rows of scored completions have no columns for references, since ties are left out: leave "
            "out --export, and share the folder of reference.store instead"
        )


def export_columns(
    path: Path, rows: Iterable[Row], groups: Sequence[PreferenceGroup], sums: Sequence[tuple[float, ...]]
) -> tuple[int, int]:
    """Write the source rows, in source order, with their reference columns. The file is whole or not there.

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.parquet``; replaced when it exists.
        rows: the source, iterable more than once; ``Row.index`` is what ``PreferenceGroup.row`` refers to.
        groups: those of the source that were kept. Rows without a group (dropped by lint) are left out: an empty
            reference would be read as 0 elsewhere.
        sums: per group, per response in the order of the group.

    Returns:
        (rows written, rows left out).

    Raises:
        UserError: an unknown extension, the file is one of the source's own, or it cannot be written.
    """
    check_export_path(path)
    place = {group.row: (index, len(group.response_ids)) for index, group in enumerate(groups)}
    left_out = 0

    def export() -> Iterator[dict[str, Any]]:
        nonlocal left_out
        left_out = 0
        for row in rows:
            if Path(row.file).exists() and path.exists() and os.path.samefile(row.file, path):
                raise UserError(f"--export {path} is the dataset itself; choose another file")
            if row.index not in place:
                left_out += 1
                continue
            index, count = place[row.index]
            yield row.data | _reference_columns(row, sums[index], count)

    write = _write_parquet if _extension(path) == ".parquet" else _write_json_lines
    written = _replace(path, lambda stream: write(stream, export, path))
    return written, left_out


def _reference_columns(row: Row, sums: tuple[float, ...], count: int) -> dict[str, Any]:
    check_export_row(row)
    if RANKING not in row.data or "responses" not in row.data:
        assert count == 2
        return dict(zip(PAIR_COLUMNS, sums, strict=True))
    # Groups hold responses best first; the column follows the row's own order.
    ranking = row.data[RANKING]
    best_first = sorted(range(len(ranking)), key=ranking.__getitem__)
    return {RANKED_COLUMN: [value for _, value in sorted(zip(best_first, sums, strict=True))]}


def _extension(path: Path) -> str | None:
    return next((e for e in _FORMATS if path.name.lower().endswith(e)), None)


Records = Callable[[], Iterator[dict[str, Any]]]


def _write_json_lines(stream: IO[bytes], records: Records, path: Path) -> int:
    target: IO[bytes] = stream
    if _extension(path) == ".jsonl.gz":
        # No time stamp and no name inside, so that equal rows are equal files.
        target = gzip.GzipFile("", "wb", fileobj=stream, mtime=0)  # type: ignore[assignment]
    count = 0
    for record in records():
        try:
            line = to_json(record, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: a value cannot be written as JSON ({error}); export to .parquet") from error
        target.write(line.encode("utf-8") + b"\n")
        count += 1
    if target is not stream:
        target.close()
    return count


def _write_parquet(stream: IO[bytes], records: Records, path: Path) -> int:
    """Twice over the rows: once for a schema that holds all of them, once to write."""
    try:
        schema: pa.Schema | None = None
        for batch in _batches(records()):
            found = pa.Table.from_pylist(batch).schema
            schema = found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
        count = 0
        with pq.ParquetWriter(stream, schema or pa.schema([]), compression="zstd") as writer:
            for batch in _batches(records()):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                count += len(batch)
        return count
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: the rows do not fit one Parquet table ({reason}); export to .jsonl") from error


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(records, _PARQUET_ROWS)):
        # A column that a batch's first row lacks would be dropped from the batch.
        names = dict.fromkeys(name for record in batch for name in record)
        yield [{name: record.get(name) for name in names} for record in batch]


def _replace(path: Path, write: Callable[[IO[bytes]], int]) -> int:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with open(temporary, "xb") as stream:
                result = write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        found = write_fault(error)
        raise UserError(f"cannot write {path}: {found.what}; {found.remedy('choose another file')}") from error
    return result
