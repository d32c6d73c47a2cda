"""Which tiles of the logits gradient a filtered backward may leave out, from the probability mass of every tile.

Legend: T rows, P rows by place, C column tiles of COLUMNS columns, V vocabulary, B row blocks of R rows.

The gradient of a row's log-prob with respect to its logits is onehot - p. Leaving out columns that do not hold the
label changes it by p on these columns, so its L1 norm changes by exactly their mass. What bounds the error is the sum
over all columns that are left out of a row, not the size of one of them: with 10^5 columns a softmax can lie below any
threshold everywhere. So tiles are left out while the *sum* stays within a budget, smallest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.head import Kept

COLUMNS = 128
"""Columns of a tile: the finest that still makes an efficient product."""
FILTER_STATS = ("dropped_mass", "kept_tiles")
"""What a filter reports of each row; see ``linear_logps``."""
UNIT = 2.0**-48
"""Masses are rounded up to whole units: sums of integers are exact in any order, and never too small."""


class FilterPlan(NamedTuple):
    """What is kept, and what is needed to say what is not."""

    kept: Kept
    mass_BRC: Tensor
    """int64, in units, by place; 0 on ignored rows."""


def check_filter_mass(filter_mass: float | None, stats: Sequence[str]) -> None:
    """Raise ValueError for a budget that is none, or for what a filter reports where there is none."""
    if filter_mass is not None and not 0 <= filter_mass < 1:
        raise ValueError(f"filter_mass must be in [0, 1), or None for the exact gradient; got {filter_mass}")
    reports = [name for name in stats if name in FILTER_STATS]
    if filter_mass is None and reports:
        raise ValueError(f"stats {', '.join(reports)} tell what filter_mass leaves out; got filter_mass=None")


def num_tiles(num_classes: int) -> int:
    return -(-num_classes // COLUMNS)


def num_blocks(num_rows: int, rows: int) -> int:
    return -(-num_rows // rows)


def plan_filter(mass_TC: Tensor, labels_T: Tensor, *, ignore_index: int, filter_mass: float, rows: int) -> FilterPlan:
    """Leave out tiles of ``rows`` rows so that no row loses more than ``filter_mass``; never one that holds a label.

    What mass_TC says of a label's own tile does not matter. A tile whose mass is nan is kept. An ignored row needs no
    tile. Waits for no device, and adds up integers only.
    """
    T, C = mass_TC.shape
    B = num_blocks(T, rows)
    used_T = labels_T != ignore_index
    labels_T = labels_T.masked_fill(~used_T, 0)
    mass_TC = mass_TC.scatter(1, (labels_T // COLUMNS).unsqueeze(1), 0).nan_to_num_(nan=1.0)
    mass_TC.masked_fill_(~used_T.unsqueeze(1), 0)
    order_T = torch.arange(T, device=labels_T.device)
    if rows > 1:
        order_T = _similar_rows_together(mass_TC, labels_T, used_T, filter_mass)
        mass_TC = mass_TC[order_T]
    mass_BRC = F.pad((mass_TC.double() / UNIT).ceil().long(), (0, 0, 0, B * rows - T)).view(B, rows, C)
    # What a tile costs the row that loses most by it decides which goes first.
    label_tiles_BC = _label_tiles(labels_T[order_T], used_T[order_T], rows, B, C)
    cost_BC, tiles_BC = mass_BRC.amax(dim=1).masked_fill_(label_tiles_BC, _NEVER).sort(dim=1, stable=True)
    lost_BRC = mass_BRC.gather(2, tiles_BC.unsqueeze(1).expand(-1, rows, -1)).cumsum_(dim=2)
    kept_BC = (lost_BRC.amax(dim=1) > int(filter_mass / UNIT)) | (cost_BC == _NEVER)
    return FilterPlan(Kept(order_T, torch.empty_like(kept_BC).scatter_(1, tiles_BC, kept_BC)), mass_BRC)


_NEVER = 2**62


def _similar_rows_together(mass_TC: Tensor, labels_T: Tensor, used_T: Tensor, filter_mass: float) -> Tensor:
    """An order in which rows of a block need few tiles together: peaked rows first, by label; ignored rows last.

    A block forms what any of its rows needs, so one flat row would make a block of peaked ones expensive.
    """
    needed_T = (mass_TC > filter_mass / mass_TC.shape[1]).sum(dim=1)
    magnitude_T = torch.log2(needed_T.double() + 1).ceil().long()
    label_bits = 31
    key_T = (magnitude_T << label_bits) + labels_T
    return key_T.masked_fill_(~used_T, _NEVER).argsort(stable=True)


def _label_tiles(labels_P: Tensor, used_P: Tensor, rows: int, B: int, C: int) -> Tensor:
    """[B, C], bool: tiles that hold the label of a row of the block, for rows by place."""
    tile_P = torch.arange(len(labels_P), device=labels_P.device) // rows * C + labels_P // COLUMNS
    # One more than there are tiles, for rows without a label.
    tile_P = tile_P.masked_fill(~used_P, B * C)
    return torch.zeros(B * C + 1, dtype=torch.bool, device=labels_P.device).index_fill_(0, tile_P, True)[:-1].view(B, C)


def filter_stats(plan: FilterPlan, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """name -> [T], of those names that are a filter's."""
    (order_T, kept_BC), mass_BRC = plan
    found = {}
    if "dropped_mass" in names:
        lost_BR = mass_BRC.masked_fill(kept_BC.unsqueeze(1), 0).sum(dim=2)
        found["dropped_mass"] = lost_BR.flatten()[: len(order_T)].double() * UNIT
    if "kept_tiles" in names:
        share_B = kept_BC.double().mean(dim=1)
        found["kept_tiles"] = share_B.repeat_interleave(mass_BRC.shape[1])[: len(order_T)]
    return {name: torch.empty_like(v).index_copy_(0, order_T, v).to(dtype) for name, v in found.items()}


def kept_elements(kept: Kept, num_classes: int, rows: int) -> Tensor:
    """[T, V], bool: the elements of the logits gradient that are formed, in the order of the inputs."""
    order_T, kept_BC = kept
    places_TV = kept_BC.repeat_interleave(rows, 0)[: len(order_T)].repeat_interleave(COLUMNS, 1)[:, :num_classes]
    return torch.empty_like(places_TV).index_copy_(0, order_T, places_TV)
