"""Rows that say again, or the opposite of, what an earlier row said, found in one pass and bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import combinations

import numpy as np

from .groups import PreferenceGroup

RECENT_KEYS = 1 << 16
"""Keys that are held in a set before they are sorted away."""


_NONE = b"no response"


class SeenKeys:
    """A growing set of 64-bit keys: a small set of recent ones, and sorted arrays of doubling size behind it.

    8 bytes a key, twice that while two arrays are merged. One false hit is to be expected in about six billion rows.
    """

    def __init__(self) -> None:
        self.recent: set[int] = set()
        self._runs: list[np.ndarray] = []

    def settled(self, keys: np.ndarray) -> np.ndarray:
        """bool: which of some keys, uint64, are in the sorted arrays. Those in ``recent`` are not looked up."""
        found = np.zeros(len(keys), dtype=bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[places] == keys
        return found

    def settle(self) -> None:
        """Sort the recent keys away when there are many."""
        if len(self.recent) < RECENT_KEYS:
            return
        run = np.sort(np.fromiter(self.recent, np.uint64, len(self.recent)))
        self.recent = set()
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)


class Copies:
    """Finds duplicates and contradictions.

    Memory: 8 to 16 bytes for each ordered pair of responses, so up to 16 MB for a million rows with two responses; and
    as much for each row with more.
    """

    def __init__(self) -> None:
        self._rows = SeenKeys()
        self._pairs = SeenKeys()

    def find(self, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[str, int]]:
        """(problem, source row) of the groups of a chunk, in order: ``duplicate`` or ``contradiction``."""
        parts = [_digests(group) for group in groups]
        rows = [key_of(*digests) for digests in parts]
        pairs = [[(key_of(p, a, b), key_of(p, b, a)) for a, b in combinations(rs, 2) if a != b] for p, *rs in parts]
        old_rows = self._rows.settled(np.array(rows, dtype=np.uint64))
        old_reversed = iter(self._pairs.settled(np.array([r for row in pairs for _, r in row], dtype=np.uint64)))
        for group, row, row_is_old, row_pairs in zip(groups, rows, old_rows, pairs, strict=True):
            reversed_is_old = [next(old_reversed) or backward in self._pairs.recent for _, backward in row_pairs]
            if row_is_old or row in self._rows.recent:
                yield "duplicate", group.row
            elif any(reversed_is_old):
                yield "contradiction", group.row
            self._rows.recent.add(row)
            self._pairs.recent.update(forward for forward, _ in row_pairs)
        self._rows.settle()
        self._pairs.settle()


def _digests(group: PreferenceGroup) -> list[bytes]:
    """Of the prompt and of the responses, best first: an unpaired one is better, or worse, than none."""
    prompt, *responses = (digest(ids.tobytes()) for ids in (group.prompt_ids, *group.response_ids))
    if group.desirable is None:
        return [prompt, *responses]
    return [prompt, *responses, _NONE] if group.desirable else [prompt, _NONE, *responses]


def digest(data: bytes) -> bytes:
    """Of the bytes of one part of a row."""
    return blake2b(data, digest_size=12).digest()


def key_of(*digests: bytes) -> int:
    """64 bits for several parts."""
    return int.from_bytes(blake2b(b"".join(digests), digest_size=8).digest(), "little")
