"""Which keys of a pack each query sees, as ranges of packed rows, and the tiles of them that FlexAttention visits.

A token sees a range of its prompt and a range that ends with itself; a window and a chunk only raise where both begin.

Letters: T packed tokens, N tiles of ``TILE`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...packing.rows import Segment
from ...packing.transfer import gather, send

TILE = 128
"""Tokens along each side of a tile: the size that FlexAttention's own masks have, a multiple of its kernels' blocks."""


class Ranges(NamedTuple):
    """What a query sees of a pack: rows from ``own_start`` to itself, and ``prefix_start`` up to ``prefix_stop``."""

    own_start: Tensor
    """int32 [T]."""
    prefix_start: Tensor
    """int32 [T]."""
    prefix_stop: Tensor
    """int32 [T]; not more than ``prefix_start`` where there is no prefix, or none of it is seen."""


class Tiles(NamedTuple):
    """The tiles that hold what is seen, in the form of ``BlockMask.from_kv_blocks``."""

    partial_counts: Tensor
    """int32 [1, 1, N]: for each tile of queries, how many tiles of keys it sees in part."""
    partial_places: Tensor
    """int32 [1, 1, N, N]: which ones, in front; the others follow."""
    full_counts: Tensor
    """int32 [1, 1, N]: the same of tiles that are seen whole."""
    full_places: Tensor
    """int32 [1, 1, N, N]."""


class _Places(NamedTuple):
    ranges: Ranges
    tiles: Tiles

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> _Places:
        return _Places(Ranges(*map(change, self.ranges)), Tiles(*map(change, self.tiles)))


def seen_keys(
    segments: tuple[Segment, ...], device: torch.device, *, window: int | None, chunk: int | None
) -> tuple[Ranges, Tiles]:
    """The keys that the queries of a pack see, on ``device``, without waiting for it.

    Args:
        segments: those of the pack, in its order.
        window: a token sees at most so many tokens, itself included.
        chunk: a token sees none before its chunk of so many.
    """
    ranges = _ranges(segments, window, chunk)
    places = _Places(Ranges(*(torch.from_numpy(x.astype(np.int32)) for x in ranges)), _tiles(*ranges))
    # alone in its memory: where a tensor lies in it would be one more number to compile for
    sent = send(gather(places, pin=device.type == "cuda"), device).map_tensors(torch.clone)
    return sent.ranges, sent.tiles


def _ranges(
    segments: tuple[Segment, ...], window: int | None, chunk: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``Ranges`` as int64 arrays."""
    table = np.array(segments, dtype=np.int64)
    start, _, prefix_start, prefix_stop = np.repeat(table, table[:, 1] - table[:, 0], axis=0).T
    query = np.arange(len(start))
    position = query - start + prefix_stop - prefix_start
    first = np.zeros_like(position)
    if window is not None:
        first = np.maximum(first, position - window + 1)
    if chunk is not None:
        first = np.maximum(first, position // chunk * chunk)
    return np.maximum(start, query - (position - first)), np.minimum(prefix_start + first, prefix_stop), prefix_stop


def _tiles(own_start: np.ndarray, prefix_start: np.ndarray, prefix_stop: np.ndarray) -> Tiles:
    tokens = len(own_start)
    size = -(-tokens // TILE)
    query = np.arange(tokens)
    seen = _pairs(query, own_start, query + 1, size) + _pairs(query, prefix_start, prefix_stop, size)
    full = seen == TILE * TILE
    return Tiles(*_ordered((seen > 0) & ~full), *_ordered(full))


def _pairs(query: np.ndarray, start: np.ndarray, stop: np.ndarray, size: int) -> np.ndarray:
    """[N, N]: how many pairs each tile has of a query and a key of its range; without ever holding all pairs."""
    some = stop > start
    row, start, stop = query[some] // TILE, start[some], stop[some]
    first, last = start // TILE, (stop - 1) // TILE
    counts = np.zeros((size, size + 1), dtype=np.int64)
    # whole tiles from the first to the last, as differences along the row, and then what these two have too much
    np.add.at(counts, (row, first), TILE)
    np.add.at(counts, (row, last + 1), -TILE)
    counts = counts.cumsum(axis=1)
    np.add.at(counts, (row, first), first * TILE - start)
    np.add.at(counts, (row, last), stop - (last + 1) * TILE)
    return counts[:, :size]


def _ordered(tiles: np.ndarray) -> tuple[Tensor, Tensor]:
    """Number and places of the tiles of each row, those that are marked first."""
    counts, places = tiles.sum(axis=1), np.argsort(~tiles, axis=1, kind="stable")
    return tuple(torch.from_numpy(x.astype(np.int32))[None, None] for x in (counts, places))  # type: ignore[return-value]
