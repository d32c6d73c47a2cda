"""The largest part of a pack that several processes divide, without these processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import mesh
from ..train.feed import TrainingPack


class _Nobody:
    """A process group whose collectives move nothing: what they fill has its shape already."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


@contextmanager
def divided(ranks: int, build: Callable[[], TrainingPack]) -> Iterator[TrainingPack]:
    """A pack as the process has it that predicts the most of its tokens; inside, models run as on that process.

    Args:
        ranks: processes that work on the pack together.
        build: makes the pack, as one of them.
    """
    if ranks == 1:
        yield build()
        return
    group: Any = _Nobody()

    def as_rank(rank: int) -> TrainingPack:
        with mesh.imagine(ranks, rank, group):
            return build()

    busiest = max(range(ranks), key=lambda rank: len(as_rank(rank).batch.own_labels))
    with mesh.imagine(ranks, busiest, group):
        yield build()
