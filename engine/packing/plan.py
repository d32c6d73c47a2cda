"""Which groups share a forward pass.

An optimizer step covers a fixed number of groups, chosen by the shuffled order alone; packing only decides how those
groups are divided into forward passes. So the budget, sharing and padding can change without changing what is learned.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from engine.data.groups import PreferenceDataset
from engine.errors import UserError

Pack = tuple[int, ...]
"""Indices of the groups in one forward pass."""
Step = tuple[Pack, ...]
"""The packs of one optimizer step."""


def group_sizes(lengths: Sequence[np.ndarray], *, share_prompts: bool = True) -> np.ndarray:
    """Tokens that each group takes in a pack.

    Args:
        lengths: per group, [1 + K] token counts: prompt, then each response.
        share_prompts: whether the prompt is laid out once, or once per response.

    Returns:
        int64 [groups].
    """
    if share_prompts:
        return np.fromiter((int(n.sum()) for n in lengths), np.int64, len(lengths))
    return np.fromiter((int(n.sum() + n[0] * (len(n) - 2)) for n in lengths), np.int64, len(lengths))


def pack_groups(sizes: Sequence[int] | np.ndarray, tokens_per_pack: int) -> list[Pack]:
    """Best-fit-decreasing bin packing of whole groups.

    Args:
        sizes: tokens of each group.
        tokens_per_pack: capacity of a pack.

    Returns:
        Packs of positions into ``sizes``, each pack ascending, largest first group first; a function of its arguments
        alone. Uses at most 11/9 of the optimal number of packs, plus one (Johnson 1974).

    Raises:
        ValueError: a group is larger than ``tokens_per_pack``.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable").tolist():
        size = int(sizes[index])
        if size > tokens_per_pack:
            raise ValueError(f"group {index} has {size} tokens, more than tokens_per_pack={tokens_per_pack}")
        place = bisect_left(free, (size, -1))
        if place < len(free):
            room, pack = free.pop(place)
            packs[pack].append(index)
        else:
            room, pack = tokens_per_pack, len(packs)
            packs.append([index])
        insort(free, (room - size, pack))
    return [tuple(sorted(pack)) for pack in packs]


def plan_epoch(
    lengths: Sequence[np.ndarray],
    *,
    pairs_per_step: int,
    tokens_per_pack: int,
    share_prompts: bool = True,
    shuffle: bool = True,
    seed: int = 42,
    epoch: int = 0,
) -> list[Step]:
    """The steps of one epoch: a pure function of its arguments.

    Every group occurs once. Each step holds ``pairs_per_step`` groups, the last one what is left over.

    Args:
        lengths: per group, [1 + K] token counts: prompt, then each response.
        pairs_per_step: groups per optimizer step.
        tokens_per_pack: most tokens in one forward pass.
        share_prompts: whether the prompt is laid out once, or once per response.
        shuffle: whether the groups are visited in an order drawn from ``(seed, epoch)`` or in source order.
        seed: base seed.
        epoch: 0-based number of the epoch.

    Raises:
        ValueError: a group is larger than ``tokens_per_pack``.
    """
    sizes = group_sizes(lengths, share_prompts=share_prompts)
    order = np.random.default_rng((seed, epoch)).permutation(len(sizes)) if shuffle else np.arange(len(sizes))
    steps: list[Step] = []
    for start in range(0, len(order), pairs_per_step):
        members = order[start : start + pairs_per_step]
        packs = pack_groups(sizes[members], tokens_per_pack)
        steps.append(tuple(tuple(members[list(pack)].tolist()) for pack in packs))
    return steps


def check_fits(dataset: PreferenceDataset, *, tokens_per_pack: int, share_prompts: bool = True) -> None:
    """Raise a ``UserError`` that names the longest group when it does not fit in one pack."""
    if not len(dataset):
        raise UserError("no preference rows are left after filtering: see `dpo check` for what was dropped and why")
    sizes = group_sizes(dataset.lengths, share_prompts=share_prompts)
    longest = int(sizes.argmax())
    if sizes[longest] > tokens_per_pack:
        raise UserError(
            f"packing.tokens_per_pack is {tokens_per_pack}, but row {dataset[longest].row} needs {sizes[longest]} "
            f"tokens: set packing.tokens_per_pack to at least {sizes[longest]}, or lower data.max_length"
        )
