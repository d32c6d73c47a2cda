"""How much of each set of a mixture an epoch takes, and which of its groups.

Every set has as many groups an epoch as ``weight``, ``fraction`` or ``rows`` ask for, counted over the groups that lint
leaves. Groups come from a fixed random order of the set, in which every epoch goes on where the last one ended, and
which begins again at its end: no group comes a second time before each has come once, and an epoch is a function of the
seed and of its number, so that a resume needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config.schema import DatasetConfig

_DRAWS = 0x6D6978
"""Keeps the random orders of sets apart from those of epochs, which have the same seed."""


@dataclass(frozen=True)
class Mixture:
    """Sets whose groups follow each other in a dataset, and how many of each an epoch takes."""

    sizes: tuple[int, ...]
    """Groups of each set."""
    counts: tuple[int, ...]
    """Groups of each set in an epoch."""
    kept: np.ndarray | None = field(default=None, compare=False)
    """int64: the groups that a dataset holds, where it holds those of some epochs alone; ascending."""

    @property
    def per_epoch(self) -> int:
        return sum(self.counts)

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [per_epoch]: places in the dataset of the groups of an epoch, set after set.

        Args:
            seed: of the run.
            epoch: 0-based number of the epoch.
        """
        first = np.concatenate([[0], np.cumsum(self.sizes)])
        parts = []
        for place, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            copies, rest = divmod(count, size)
            order = np.random.default_rng((seed, _DRAWS, place)).permutation(size) if rest else np.arange(size)
            drawn = order[(epoch * rest + np.arange(rest)) % size]
            parts.append(first[place] + np.sort(np.concatenate([np.tile(np.arange(size), copies), drawn])))
        drawn = np.concatenate(parts).astype(np.int64)
        return drawn if self.kept is None else np.searchsorted(self.kept, drawn)

    def used(self, seed: int, epochs: int) -> np.ndarray:
        """int64: places of the groups that some epochs take, ascending. Not of a mixture that holds a part alone."""
        return np.unique(np.concatenate([self.draw(seed, epoch) for epoch in range(self._different(epochs))]))

    def _different(self, epochs: int) -> int:
        """Epochs after which every set has come round."""
        rounds = [math.ceil(size / count) for size, count in zip(self.sizes, self.counts, strict=True)]
        return min(epochs, max(rounds))


def counts_of(sets: Sequence[DatasetConfig], sizes: Sequence[int]) -> tuple[int, ...]:
    """Groups of each set in an epoch, at least one.

    Args:
        sizes: groups of each set.
    """
    if sets[0].weight is not None:
        return shared_out(sum(sizes), [one.weight or 0.0 for one in sets])
    return tuple(
        max(1, round(one.fraction * size)) if one.fraction is not None else one.rows or 1
        for one, size in zip(sets, sizes, strict=True)
    )


def shared_out(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportions of weights that add up to ``total``, but none is 0."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    for place in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[place] += 1
    return tuple(max(1, count) for count in counts)


def describe_mixture(mixture: Mixture, labels: Sequence[str]) -> list[str]:
    """A line for each set: its rows in an epoch, their share, and how often each row comes."""
    width = max(map(len, labels))
    digits = max(len(f"{count:,}") for count in (*mixture.counts, *mixture.sizes))
    return [
        f"{label:<{width}}  {count:>{digits},} of {size:>{digits},} rows, {count / mixture.per_epoch:6.1%} of the epoch"
        + (f", each {count / size:.2f} times" if count > size else "")
        for label, count, size in zip(labels, mixture.counts, mixture.sizes, strict=True)
    ]
