"""A pack as rows: one sequence a response, prompt ++ response, for what cannot run on packs.

Rows stand in blocks, padded on the right to the longest of their block; or end to end without padding, for modules that
are told where each begins. A prompt that is shared stands in the row of every response; back in the pack it is taken
from the first one.

Shape suffixes: T packed tokens, R rows, K tokens of all rows, C cells of all blocks, padding included, B rows of a
block, L its longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from .gather import gather_rows, pick_order

Blocks = Literal["alike", "together", "alone", "joined"]
"""Which rows share a block: those of like length, all, or none. joined: all are laid end to end, as one row."""

BLOCK_COST = 512
"""Cells of padding that are cheaper than one more block, whose operations have to be launched."""


class Segment(NamedTuple):
    """Packed rows ``start:stop`` attend, causally, to rows ``prefix_start:prefix_stop`` followed by themselves."""

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return self.stop - self.start + self.prefix_stop - self.prefix_start


class Boundaries(NamedTuple):
    """Where rows begin that are laid end to end, in the forms in which modules take it."""

    cu_seqlens_R1: torch.Tensor
    """int32 [R + 1]: where each row begins, and where the last one ends."""
    cu_seqlens_cpu_R1: torch.Tensor
    """The same, always on the CPU."""
    seq_idx_1K: torch.Tensor
    """int32 [1, K]: the number of the row of each token."""


@dataclass(frozen=True)
class RowPlan:
    """Where the tokens of a pack are in its rows."""

    shapes: tuple[tuple[int, int], ...]
    """(B, L) of each block."""
    num_tokens: int
    """T."""
    picks_K: torch.Tensor
    """int64 [K]: packed row of each token of the rows, in the order of ``cells_K``."""
    order_K: torch.Tensor
    """int64 [K], and ``counts``: what ``pick_order`` gives for ``picks_K``."""
    counts: tuple[int, ...]
    cells_K: torch.Tensor
    """int64 [K], ascending: where each stands, all blocks laid end to end."""
    homes_T: torch.Tensor
    """int64 [T]: the cell that each packed row is taken from."""
    boundaries: Boundaries | None = None
    """Of rows that are laid end to end."""

    @property
    def num_cells(self) -> int:
        """C."""
        return sum(rows * length for rows, length in self.shapes)

    @property
    def num_row_tokens(self) -> int:
        """K."""
        return len(self.picks_K)

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RowPlan:
        """The same plan with ``change`` of each of its tensors."""
        ends = self.boundaries
        return replace(
            self,
            boundaries=ends and Boundaries(change(ends[0]), ends[1], change(ends[2])),
            picks_K=change(self.picks_K),
            order_K=change(self.order_K),
            cells_K=change(self.cells_K),
            homes_T=change(self.homes_T),
        )

    def split(self, x_T: torch.Tensor, fill: int = 0) -> list[torch.Tensor]:
        """[B, L, ...] of each block, from packed rows [T, ...]; padding is ``fill``."""
        cells = gather_rows(x_T, self.picks_K, self.order_K, self.counts)
        if self.num_cells > self.num_row_tokens:
            blank = cells.new_full((self.num_cells, *cells.shape[1:]), fill)
            cells = blank.index_copy_(0, self.cells_K, cells)
        sizes = [rows * length for rows, length in self.shapes]
        return [part.unflatten(0, shape) for part, shape in zip(cells.split(sizes), self.shapes, strict=True)]

    def join(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T, ...], from [B, L, ...] of each block."""
        return torch.cat([block.flatten(0, 1) for block in blocks]).index_select(0, self.homes_T)

    def masks(self) -> list[torch.Tensor]:
        """int64 [B, L] of each block: 1 for a token, 0 for padding."""
        return self.split(torch.ones(self.num_tokens, dtype=torch.int64, device=self.homes_T.device))


def plan_rows(segments: Sequence[Segment], blocks: Blocks = "alike") -> RowPlan:
    """The rows of a pack that consists of ``segments``, on the CPU."""
    lengths_R = np.array([s.num_keys for s in segments])
    members = _blocks(lengths_R, blocks)
    order_R = np.concatenate(members)
    shapes = tuple((len(rows), int(lengths_R[rows].max())) for rows in members)
    widths_R = np.repeat([length for _, length in shapes], [rows for rows, _ in shapes])
    boundaries = None
    if blocks == "joined":
        shapes, widths_R, boundaries = ((1, int(lengths_R.sum())),), lengths_R, _boundaries(lengths_R)
    starts_R = np.cumsum(widths_R) - widths_R
    cells_K = np.concatenate([start + np.arange(lengths_R[r]) for r, start in zip(order_R, starts_R, strict=True)])
    sorted_segments = [segments[r] for r in order_R]
    picks_K = np.concatenate([np.r_[s.prefix_start : s.prefix_stop, s.start : s.stop] for s in sorted_segments])
    homes_T = np.empty(segments[-1].stop, np.int64)
    for segment, start in zip(sorted_segments, starts_R, strict=True):
        first = start + segment.num_keys - segment.num_queries
        homes_T[segment.start : segment.stop] = np.arange(first, first + segment.num_queries)
    order_K, counts = pick_order(picks_K)
    picks, order, cells, homes = (
        torch.from_numpy(values.astype(np.int64, copy=False)) for values in (picks_K, order_K, cells_K, homes_T)
    )
    return RowPlan(shapes, len(homes_T), picks, order, counts, cells, homes, boundaries)


def _boundaries(lengths_R: np.ndarray) -> Boundaries:
    ends = torch.from_numpy(np.r_[0, np.cumsum(lengths_R)].astype(np.int32))
    numbers = np.repeat(np.arange(len(lengths_R), dtype=np.int32), lengths_R)
    return Boundaries(ends, ends.clone(), torch.from_numpy(numbers)[None])


def count_cells(lengths_R: np.ndarray, blocks: Blocks = "alike") -> int:
    """C, of a pack whose rows have these lengths."""
    if blocks == "joined":
        return int(lengths_R.sum())
    return sum(len(rows) * int(lengths_R[rows].max()) for rows in _blocks(lengths_R, blocks))


def _blocks(lengths_R: np.ndarray, blocks: Blocks) -> list[np.ndarray]:
    """The rows of each block."""
    if blocks == "alone":
        return [np.array([row]) for row in range(len(lengths_R))]
    if blocks == "joined":
        return [np.arange(len(lengths_R))]
    order_R = np.argsort(-lengths_R, kind="stable")
    if blocks == "together":
        return [order_R]
    # The cheapest division of the rows from each one on: padding is paid for by the cell, a block at once.
    sorted_R = lengths_R[order_R]
    count = len(sorted_R)
    best = np.zeros(count + 1, np.int64)
    ends = np.zeros(count, np.int64)
    for first in range(count - 1, -1, -1):
        costs = np.arange(1, count - first + 1) * sorted_R[first] + BLOCK_COST + best[first + 1 :]
        ends[first] = first + 1 + int(costs.argmin())
        best[first] = costs.min()
    members, first = [], 0
    while first < count:
        members.append(order_R[first : ends[first]])
        first = int(ends[first])
    return members
