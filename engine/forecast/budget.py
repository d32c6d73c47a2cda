"""The largest ``packing.tokens_per_pack`` that fits a given amount of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..model.policy import Layout
from ..packing import Step, group_sizes
from .counting import layers_that_repeat
from .memory import Memory, forecast_pack
from .target import Target

UNIT = 256
"""Tokens that budgets are multiples of."""
_CLOSE = 0.01
"""How far apart budgets are, of which one fits and the other does not, when the search ends."""


class Budget(NamedTuple):
    """What fits."""

    tokens: int
    """0 where not even the longest group does."""
    whole_step: bool
    """Whether a step fits in a single pack, so that a larger budget changes nothing."""
    memory: Memory
    """Of the largest pack that fits; of the longest group where that does not."""


def largest_budget(
    config: RunConfig,
    dataset: PreferenceDataset,
    steps: Sequence[Step],
    *,
    room: int,
    target: Target,
    resident: int,
    layout: Layout,
) -> Budget:
    """Search with packs that are filled from the step with the most tokens.

    Args:
        steps: the plan of an epoch.
        room: bytes that the process may take of its device.
    """
    sizes = group_sizes(dataset.lengths, share_prompts=config.packing.share_prompts, in_rows=layout.in_rows)
    step = max((sum(packs, ()) for packs in steps), key=lambda step: int(sizes[list(step)].sum()))

    options: dict[str, Any] = {"target": target, "resident": resident, "layout": layout}
    options["repeats"] = layers_that_repeat(config, target)

    def of(tokens: int) -> Memory:
        groups = _filled(dataset, step, sizes, tokens)
        several = len(groups) < len(step)
        return forecast_pack(config, groups, several=several, **options)

    least, most = (-(-int(size) // UNIT) * UNIT for size in (sizes.max(), sizes[list(step)].sum()))
    return _search(of, least, max(least, most), room, target)


def _search(of: Callable[[int], Memory], least: int, most: int, room: int, target: Target) -> Budget:
    """Between a budget that fits and one that does not, where memory would end if it grew in a straight line."""
    low, high = of(least), of(most)
    if target.needed(low.peak) > room:
        return Budget(0, False, low)
    if target.needed(high.peak) <= room:
        return Budget(most, True, high)
    while most - least > max(UNIT, _CLOSE * least):
        taken, beyond = (target.needed(memory.peak) for memory in (low, high))
        share = (room - taken) / (beyond - taken)
        # Never at an end, which would not move.
        share = min(max(share, 0.1), 0.9)
        middle = max(least + UNIT, int(least + share * (most - least)) // UNIT * UNIT)
        memory = of(middle)
        if target.needed(memory.peak) <= room:
            least, low = middle, memory
        else:
            most, high = middle, memory
    return Budget(least, False, low)


def _filled(dataset: PreferenceDataset, step: Sequence[int], sizes: np.ndarray, tokens: int) -> list[PreferenceGroup]:
    """Groups of a step that fit in a pack of so many tokens, the largest first; at least the largest of all."""
    order = sorted(step, key=lambda i: -int(sizes[i]))
    longest = int(sizes.argmax())
    order = order if longest in order else [longest, *order]
    chosen, room = [], tokens
    for i in order:
        if sizes[i] <= room:
            chosen.append(i)
            room -= int(sizes[i])
    return [dataset[i] for i in chosen or [longest]]
