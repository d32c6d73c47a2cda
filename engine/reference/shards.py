"""One shard: an immutable Parquet file of keys and per-token log-probs that is either whole or not there.

Columns: ``key`` fixed_size_binary[16], ``logps`` list<float32> (natural log, one value per completion token). The
metadata of the schema holds the format version and two checksums: of the keys alone, so that an index can be built
without reading values, and of keys, lengths and values together.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..arrow import arrow_of, numpy_of
from ..durable import FILE_SUFFIX, replace_file, sync
from ..errors import UserError, write_fault

KEY_BYTES = 16
SUFFIX = ".parquet"
# No writer needs a minute for a shard; an hour leaves room for clocks of file servers that disagree.
TEMPORARY_AGE_SECONDS = 3600.0

_TYPES = {"key": pa.binary(KEY_BYTES), "logps": pa.list_(pa.float32())}
_FORMAT = "1"
_FORMAT_FIELD = b"dpo.reference.format"
_KEYS_FIELD = b"dpo.reference.keys_blake2b"
_CONTENT_FIELD = b"dpo.reference.content_blake2b"
_REMEDY = "delete this file and run `dpo precompute`: only its rows are computed again"


def write_shard(folder: Path, values: Mapping[bytes, np.ndarray]) -> Path:
    """Write ``values`` (key -> float32 [R]) as one shard of ``folder``, which is created when absent.

    The file is written under a temporary name, flushed to disk and renamed, so a reader, or a later process after a
    kill or a power cut, sees all of it or nothing. Its name is the checksum of its content: processes that write at
    once cannot collide, and the same rows written twice are one file.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    keys = np.frombuffer(b"".join(values), np.uint8)
    lengths = np.fromiter((len(v) for v in values.values()), np.int64, len(values))
    flat = np.concatenate([np.asarray(v, np.float32) for v in values.values()])
    keys_sum, content_sum = _checksums(keys, lengths, flat)
    data = _encode(keys, lengths, flat, keys_sum, content_sum)
    path = folder / f"{content_sum.decode()}{SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        replace_file(path, data)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return path


def cannot_write(folder: Path, error: OSError) -> UserError:
    """For a folder of the store that does not take a file."""
    found = write_fault(error)
    advice = found.remedy("choose another folder with reference.store")
    return UserError(f"cannot write reference log-probs to {folder}: {found.what}; {advice}")


def read_keys(path: Path) -> np.ndarray:
    """The keys of a shard, as numpy ``S16`` [rows].

    Raises:
        UserError: the file is damaged, not a shard, or of another format.
    """
    table, metadata = _read(path, ["key"])
    keys = _key_bytes(table)
    if _digest(keys) != metadata[_KEYS_FIELD]:
        raise _damaged(path, "its keys do not match their checksum")
    return keys.view(f"S{KEY_BYTES}")


class ShardValues(NamedTuple):
    """The log-probs of a shard: row i is ``flat[offsets[i] : offsets[i + 1]]``."""

    flat: np.ndarray
    """float32 [tokens]."""
    offsets: np.ndarray
    """int64 [rows + 1]."""

    def take(self, rows: np.ndarray) -> list[np.ndarray]:
        """Some rows, float32 [R] each, as copies that do not keep the shard in memory."""
        return [self.flat[self.offsets[row] : self.offsets[row + 1]].copy() for row in rows.tolist()]

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """The sum of each of some rows, float64. No row is empty."""
        return np.add.reduceat(self.flat, self.offsets[:-1], dtype=np.float64)[rows]


def read_values(path: Path) -> ShardValues:
    """The log-probs of a shard, after its whole content was checked.

    Raises:
        UserError: the file is damaged, not a shard, or of another format.
    """
    table, metadata = _read(path, ["key", "logps"])
    column = table.column("logps").combine_chunks()
    if column.null_count:
        raise _damaged(path, "it has empty rows")
    if column.values.null_count:
        raise _damaged(path, "it has empty values")
    offsets = numpy_of(column.offsets).astype(np.int64)
    flat = numpy_of(column.values)[: offsets[-1]]
    if _checksums(_key_bytes(table), np.diff(offsets), flat)[1] != metadata[_CONTENT_FIELD]:
        raise _damaged(path, "its content does not match its checksum")
    return ShardValues(flat, offsets)


def remove_stale_temporaries(folder: Path) -> None:
    """Delete what killed writers left behind, once it is too old to belong to a live one."""
    oldest_live = time.time() - TEMPORARY_AGE_SECONDS
    with contextlib.suppress(OSError):
        for path in folder.glob(f"*{FILE_SUFFIX}"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest_live:
                    path.unlink()


def _encode(keys: np.ndarray, lengths: np.ndarray, flat: np.ndarray, keys_sum: bytes, content_sum: bytes) -> memoryview:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    table = pa.table(
        {
            "key": pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(lengths), [None, pa.py_buffer(keys)]),
            "logps": pa.ListArray.from_arrays(arrow_of(offsets), arrow_of(flat)),
        }
    ).replace_schema_metadata({_FORMAT_FIELD: _FORMAT, _KEYS_FIELD: keys_sum, _CONTENT_FIELD: content_sum})
    sink = io.BytesIO()
    # Splitting the bytes of floats into planes is what lets zstd find anything: exponents repeat, mantissas do not.
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        column_encoding={"logps.list.element": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,
    )
    return sink.getbuffer()


def _read(path: Path, columns: list[str]) -> tuple[pa.Table, dict[bytes, bytes]]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            _check_format(path, metadata)
            table = file.read(columns=columns)
        if dict(zip(table.schema.names, table.schema.types, strict=True)) != {name: _TYPES[name] for name in columns}:
            raise _damaged(path, "it lacks the columns of a shard")
        table.validate(full=True)
    except (pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
        raise _damaged(path, f"Parquet cannot be read ({str(error).splitlines()[0]})") from error
    except OSError as error:
        # pyarrow reports damaged pages as OSError without an errno.
        if error.errno is None:
            raise _damaged(path, f"Parquet cannot be read ({str(error).splitlines()[0]})") from error
        raise UserError(f"cannot read the reference shard {path}: {error.strerror}; make it readable") from error
    return table, metadata


def _check_format(path: Path, metadata: dict[bytes, bytes]) -> None:
    if not {_FORMAT_FIELD, _KEYS_FIELD, _CONTENT_FIELD} <= metadata.keys():
        raise _damaged(path, "it lacks the marks of a shard")
    found = metadata[_FORMAT_FIELD].decode(errors="replace")
    if found != _FORMAT:
        raise UserError(
            f"the reference shard {path} has format {found}, this version reads {_FORMAT}; "
            "choose another folder with reference.store, or delete this file"
        )


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"the reference shard {path} is damaged: {why}; {_REMEDY}")


def _key_bytes(table: pa.Table) -> np.ndarray:
    column = table.column("key").combine_chunks()
    start = column.offset * KEY_BYTES
    return np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * KEY_BYTES]


def _checksums(keys: np.ndarray, lengths: np.ndarray, flat: np.ndarray) -> tuple[bytes, bytes]:
    return _digest(keys), _digest(keys, lengths.astype("<i8"), flat.astype("<f4", copy=False))


def _digest(*arrays: np.ndarray) -> bytes:
    hasher = blake2b(digest_size=16)
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest().encode()
