"""Which groups share a forward pass.

An optimizer step covers a fixed number of groups, chosen by the shuffled order alone; packing only decides how those
groups are divided into forward passes. So the budget, sharing and padding can change without changing what is learned.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace

import numpy as np

from ..config.schema import PackingConfig
from ..data.groups import PreferenceDataset
from ..data.lengths import GroupLengths
from ..errors import UserError

Pack = tuple[int, ...]
"""Indices of the groups in one forward pass."""
Step = tuple[Pack, ...]
"""The packs of one optimizer step."""

PAIRS_PER_ROW = 16_384
"""Query-key pairs that cost as much as the matrix products of one row: 6 * hidden size where the layers have 12 *
hidden size^2 weights. Between those of models of 0.5 and 8 billion weights (8,000 and 27,000)."""


def group_sizes(lengths: Sequence[np.ndarray], *, share_prompts: bool = True, in_rows: bool = False) -> np.ndarray:
    """Tokens that each group takes in a pack.

    Args:
        lengths: per group, [1 + K] token counts: prompt, then each response.
        share_prompts: whether the prompt is laid out once, or once per response.
        in_rows: every response has a row with its prompt, padded to the longest of the group.

    Returns:
        int64 [groups].
    """
    flat = GroupLengths.of(lengths)
    return flat.responses * (flat.prompts + flat.longest) if in_rows else flat.packed(share_prompts=share_prompts)


def group_costs(lengths: Sequence[np.ndarray], *, share_prompts: bool = True) -> np.ndarray:
    """What each group costs to compute, in visible query-key pairs: ``PAIRS_PER_ROW`` for each row of the pack, and
    the pairs that attention looks at. The head is left out.

    Returns:
        int64 [groups]; the cost of a pack is the sum over its groups.
    """
    flat = GroupLengths.of(lengths)
    rows_G, pairs_G = (f(share_prompts=share_prompts) for f in (flat.packed, flat.visible_pairs))
    return PAIRS_PER_ROW * rows_G + pairs_G


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


def pack_lengths(
    lengths: Sequence[np.ndarray], tokens_per_pack: int, *, share_prompts: bool = True, in_rows: bool = False
) -> list[Pack]:
    """Packs of groups of these lengths: by ``pack_groups``, or in rows by ``pack_rows``."""
    if in_rows:
        return pack_rows(GroupLengths.of(lengths), tokens_per_pack)
    return pack_groups(group_sizes(lengths, share_prompts=share_prompts), tokens_per_pack)


def pack_rows(lengths: GroupLengths, tokens_per_pack: int) -> list[Pack]:
    """Packs of whole groups whose responses are rows, padded to the longest of a pack: groups of like length together.

    Args:
        tokens_per_pack: most tokens in the rows of a pack, padding included.

    Returns:
        Packs of positions into ``lengths``, each ascending, the longest rows first.

    Raises:
        ValueError: a group is larger than ``tokens_per_pack``.
    """
    widths_G, rows_G = lengths.prompts + lengths.longest, lengths.responses
    packs: list[list[int]] = []
    width = count = 0
    for index in np.argsort(-widths_G, kind="stable").tolist():
        rows = int(rows_G[index])
        if not packs or (count + rows) * width > tokens_per_pack:
            packs.append([])
            width, count = int(widths_G[index]), 0
        if (count + rows) * width > tokens_per_pack:
            raise ValueError(f"group {index} has {rows * width} tokens, more than tokens_per_pack={tokens_per_pack}")
        packs[-1].append(index)
        count += rows
    return [tuple(sorted(pack)) for pack in packs]


def _deal_rows(packs: list[Pack], costs: np.ndarray, ranks: int) -> list[list[Pack]]:
    """The packs of each rank for one step in rows: equally many, of about the same cost.

    Packs are halved until each rank has as many; where there are too few groups, some are empty.
    """
    wanted = -(-len(packs) // ranks) * ranks
    while len(packs) < wanted and (largest := max(packs, key=len)) and len(largest) > 1:
        packs.remove(largest)
        packs += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return _deal([*packs, *[()] * (wanted - len(packs))], costs, ranks)


def _balance(sizes: np.ndarray, costs: np.ndarray, tokens_per_pack: int, packs: int, ranks: int) -> list[list[Pack]]:
    """The packs of each rank for one step: equally many, of about the same cost.

    Args:
        sizes, costs: of the groups of the step.
        packs: how many packs hold them.
    """
    per_rank = -(-packs // ranks)
    # Even costs can leave no pack with room for a long group; with a pack for each group there always is.
    while (spread := _spread(sizes, costs, tokens_per_pack, per_rank * ranks)) is None:
        per_rank += 1
    return _deal(spread, costs, ranks)


def _deal(spread: list[Pack], costs: np.ndarray, ranks: int) -> list[list[Pack]]:
    """The packs of each rank, of ``spread`` with a multiple of their number, the dearest first."""
    spread = sorted(spread, key=lambda pack: -sum(int(costs[i]) for i in pack))
    # Processes wait for each other after every pack, so packs of about the same cost run side by side; whoever had the
    # dearer one of a round is given the cheaper one of the next.
    rounds = [spread[start : start + ranks] for start in range(0, len(spread), ranks)]
    return [[packs[r] if n % 2 == 0 else packs[-1 - r] for n, packs in enumerate(rounds)] for r in range(ranks)]


def _spread(sizes: np.ndarray, costs: np.ndarray, tokens_per_pack: int, packs: int) -> list[Pack] | None:
    """Each group, the dearest first, to the cheapest pack that has room; None when none has."""
    members: list[list[int]] = [[] for _ in range(packs)]
    room = [tokens_per_pack] * packs
    heap = [(0, pack) for pack in range(packs)]
    for index in np.argsort(-costs, kind="stable").tolist():
        size, full = int(sizes[index]), []
        while heap and room[heap[0][1]] < size:
            full.append(heappop(heap))
        if not heap:
            return None
        cost, pack = heap[0]
        members[pack].append(index)
        room[pack] -= size
        heapreplace(heap, (cost + int(costs[index]), pack))
        for entry in full:
            heappush(heap, entry)
    return [tuple(sorted(pack)) for pack in members]


def epoch_order(members: np.ndarray, packing: PackingConfig, *, seed: int, epoch: int) -> np.ndarray:
    """The groups of an epoch in the order in which its steps take them; a function of the arguments alone."""
    return members[np.random.default_rng((seed, epoch)).permutation(len(members))] if packing.shuffle else members


def plan_epoch(
    lengths: Sequence[np.ndarray],
    packing: PackingConfig,
    *,
    seed: int = 42,
    epoch: int = 0,
    ranks: int = 1,
    rank: int = 0,
    members: np.ndarray | None = None,
) -> list[Step]:
    """The packs of ``rank`` in the steps of one epoch: a pure function of the arguments.

    Every group occurs once over all ranks, or as often as in ``members``. Each step holds ``packing.pairs_per_step``
    groups, the last one what is left over; which ones does not depend on the ranks. In a step every rank has the same
    number of packs, of about the same cost, the dearest first; a pack is empty where a step has fewer groups than
    packs.

    Args:
        lengths: per group, [1 + K] token counts: prompt, then each response.
        packing: with ``shuffle`` the groups are visited in an order drawn from ``(seed, epoch)``, else in source order.
        seed: base seed.
        epoch: 0-based number of the epoch.
        ranks: processes that share each step.
        rank: 0-based number of one of them.
        members: the groups of the epoch where they are not all (``PreferenceDataset.epoch``).

    Raises:
        ValueError: a group is larger than ``packing.tokens_per_pack``, or there is no such rank.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be in 0..{ranks - 1} for ranks={ranks}, got {rank}")
    lengths = GroupLengths.of(lengths)
    in_rows = packing.layout == "rows"
    share = packing.share_prompts and not in_rows
    sizes = group_sizes(lengths, share_prompts=share)
    costs = group_costs(lengths, share_prompts=share)
    members = np.arange(len(sizes)) if members is None else members
    order = epoch_order(members, packing, seed=seed, epoch=epoch)
    steps: list[Step] = []
    for start in range(0, len(order), packing.pairs_per_step):
        step = order[start : start + packing.pairs_per_step]
        if in_rows:
            packs = _deal_rows(pack_rows(lengths.take(step), packing.tokens_per_pack), costs[step], ranks)[rank]
        else:
            packs = pack_groups(sizes[step], packing.tokens_per_pack)
        if ranks > 1 and not in_rows:
            packs = _balance(sizes[step], costs[step], packing.tokens_per_pack, len(packs), ranks)[rank]
        steps.append(tuple(tuple(step[list(pack)].tolist()) for pack in packs))
    return steps


def check_fits(
    dataset: PreferenceDataset,
    *,
    tokens_per_pack: int,
    share_prompts: bool = True,
    in_rows: bool = False,
    processes: int = 1,
) -> None:
    """Raise a ``UserError`` that names the longest group when it does not fit in one pack.

    Args:
        tokens_per_pack: of all processes that work on a pack together.
        processes: how many these are.
    """
    if not len(dataset):
        raise UserError("no preference rows are left after filtering: see `dpo check` for what was dropped and why")
    sizes = group_sizes(dataset.lengths, share_prompts=share_prompts, in_rows=in_rows)
    longest = int(sizes.argmax())
    if sizes[longest] > tokens_per_pack:
        each, needed = tokens_per_pack // processes, int(sizes[longest])
        together = f" in each of {processes} processes" if processes > 1 else ""
        divided = "" if in_rows else f", divide packs over processes (train.context_parallel {-(-needed // each)})"
        raise UserError(
            f"packing.tokens_per_pack is {each}{together}, but row {dataset[longest].label} needs {needed} tokens: set "
            f"packing.tokens_per_pack to at least {-(-needed // processes)}{divided}, or lower data.max_length"
        )
