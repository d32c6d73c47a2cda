"""The reference store: per-token log-probs of completions, found by the content they belong to.

Keys are 16 bytes, from ``keys.response_key``. Their first four bytes stand for the reference model and
name a sub-folder, so that one cache folder serves many models and a run reads the index of its own model alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..paths import expanded
from . import shards
from .shards import (
    KEY_BYTES,
    ShardValues,
    read_keys,
    read_values,
    remove_stale_temporaries,
    write_shard,
)

# 32 MiB of values: small enough to hold and to lose, large enough that a million rows are some dozens of files.
TOKENS_PER_SHARD = 8 << 20
_PREFIX_BYTES = 4


@dataclass
class _Partition:
    """The index of one model's shards: sorted keys, and where each lies."""

    folder: Path
    paths: list[Path] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, f"S{KEY_BYTES}"))
    shard: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def update(self) -> _Partition:
        """Bring the index up to what lies in the folder now; only shards that are new are read."""
        names = _shard_names(self.folder)
        known = {path.name for path in self.paths}
        if not known.issubset(names):
            return _Partition(self.folder).update()
        # Oldest first: a run that is resumed finds the values that it began with, whatever was added since.
        new = sorted(set(names) - known, key=lambda name: (_written_at(self.folder / name), name))
        if not new:
            return self
        keys, shard, row = [self.keys], [self.shard], [self.row]
        for name in new:
            keys.append(read_keys(self.folder / name))
            shard.append(np.full(len(keys[-1]), len(self.paths), np.int32))
            row.append(np.arange(len(keys[-1]), dtype=np.int32))
            self.paths.append(self.folder / name)
        merged = np.concatenate(keys)
        # Stable, so that of duplicates the shard that was indexed first, the oldest, is found, every time.
        order = np.argsort(merged, kind="stable")
        self.keys = merged[order]
        self.shard = np.concatenate(shard)[order]
        self.row = np.concatenate(row)[order]
        return self

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Position in the index of each wanted key, or -1."""
        if not len(self.keys):
            return np.full(len(wanted), -1, np.int64)
        place = np.searchsorted(self.keys, wanted)
        place[place == len(self.keys)] = 0
        return np.where(self.keys[place] == wanted, place, -1)


class ReferenceStore:
    """A folder of immutable shards that any number of processes may read and extend at once.

    Writers only ever add files, each renamed into place when it is whole. Of a row that two writers add, both values
    are kept and the older one is found. Nothing is locked, so a killed process leaves nothing to clean but a temporary
    file, which is ignored, and deleted once it is an hour old.

    Every look-up sees what other processes have added before it, at the price of listing one folder, so look up many
    keys at once.

    Memory: the index takes 24 bytes a response and is read on first use of a model; values are read one shard (at most
    32 MiB of them) at a time, so ``get`` and ``sums`` need little more than what they return, however large the store.

    Args:
        path: folder of the store; created by the first ``add``.

    Raises:
        UserError: ``path`` is not a folder or cannot be read; later, a shard is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = expanded(path)
        self._partitions: dict[bytes, _Partition] = {}
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"reference.store: {self.path} is a file; give a folder")

    def __len__(self) -> int:
        """Number of different responses, over all models. Reads the whole index."""
        for folder in _subfolders(self.path):
            self._partition(bytes.fromhex(folder.name))
        return sum(len(np.unique(p.keys)) for p in self._partitions.values())

    def __contains__(self, key: bytes) -> bool:
        return not self.missing([key])

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Per-token log-probs, float32 [R], of those ``keys`` that are stored; the others are not in the result."""
        found: dict[bytes, np.ndarray] = {}
        for members, values, rows in self._scan(keys):
            found.update(zip(members, values.take(rows), strict=True))
        return found

    def sums(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The sum of the log-probs, in float64, of those ``keys`` that are stored."""
        found: dict[bytes, float] = {}
        for members, values, rows in self._scan(keys):
            found.update(zip(members, values.sums(rows).tolist(), strict=True))
        return found

    def _scan(self, keys: Sequence[bytes]) -> Iterator[tuple[list[bytes], ShardValues, np.ndarray]]:
        """Shard by shard: the stored ones among ``keys``, the shard's values, and the rows of these keys in it."""
        for prefix, wanted in _by_prefix(keys).items():
            partition = self._partition(prefix)
            place = partition.find(_as_array(wanted))
            found = np.flatnonzero(place >= 0)
            shard = partition.shard[place[found]]
            for index in np.unique(shard).tolist():
                members = found[shard == index]
                values = read_values(partition.paths[index])
                yield [wanted[m] for m in members.tolist()], values, partition.row[place[members]]

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of ``keys`` that are not stored, each once, in the order in which they first occur."""
        absent: set[bytes] = set()
        for prefix, wanted in _by_prefix(keys).items():
            place = self._partition(prefix).find(_as_array(wanted))
            absent.update(wanted[i] for i in np.flatnonzero(place < 0).tolist())
        return [key for key in dict.fromkeys(keys) if key in absent]

    def add(self, values: Mapping[bytes, np.ndarray]) -> None:
        """Store per-token log-probs; durable when it returns.

        Args:
            values: key -> one float per completion token, at least one, natural log.

        Raises:
            ValueError: a key of another size, an array of another shape, an empty one, or a value that is not finite.
            UserError: the folder cannot be written, or the disk is full.
        """
        checked = {key: _checked(key, value) for key, value in values.items()}
        for prefix, keys in _by_prefix(list(checked)).items():
            folder = self.folder(prefix)
            remove_stale_temporaries(folder)
            for start, stop in _shard_bounds([len(checked[key]) for key in keys]):
                write_shard(folder, {key: checked[key] for key in keys[start:stop]})

    def folder(self, key: bytes) -> Path:
        """Where the shards of a key's model are."""
        return self.path / key[:_PREFIX_BYTES].hex()

    def _partition(self, prefix: bytes) -> _Partition:
        known = self._partitions.get(prefix) or _Partition(self.folder(prefix))
        self._partitions[prefix] = known.update()
        return self._partitions[prefix]


def _checked(key: bytes, value: np.ndarray) -> np.ndarray:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
    array = np.ascontiguousarray(value, dtype=np.float32)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"log-probs of {key.hex()} must be a non-empty vector, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"log-probs of {key.hex()} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _shard_bounds(lengths: list[int]) -> Iterator[tuple[int, int]]:
    start, tokens = 0, 0
    for stop, length in enumerate(lengths):
        if stop > start and tokens + length > TOKENS_PER_SHARD:
            yield start, stop
            start, tokens = stop, 0
        tokens += length
    if lengths:
        yield start, len(lengths)


def _by_prefix(keys: Sequence[bytes]) -> dict[bytes, list[bytes]]:
    groups: dict[bytes, list[bytes]] = {}
    for key in dict.fromkeys(keys):
        groups.setdefault(key[:_PREFIX_BYTES], []).append(key)
    return groups


def _as_array(keys: list[bytes]) -> np.ndarray:
    # S16 pads with zero bytes when it compares, which is exact for keys that all have 16 bytes.
    return np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")


def _shard_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(shards.SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read the reference store {folder}: {error.strerror}; make it readable") from error


def _written_at(path: Path) -> int:
    """Time of writing, in nanoseconds; 0 when it cannot be told, which reading the file then reports."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and _is_prefix(p.name))


def _is_prefix(name: str) -> bool:
    return len(name) == 2 * _PREFIX_BYTES and all(c in "0123456789abcdef" for c in name)
