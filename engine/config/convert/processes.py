"""What other trainers say of kernels and of processes that divide a run, in the terms of ``model`` and ``train``."""

from __future__ import annotations

from ..trl_processes import COMPILE, LIGER, ONE_KIND
from .reading import Reading


def read_kernels(reading: Reading, liger: str, compiled: str = "") -> None:
    """Kernels of blocks from switches; false leaves what is there to ``model.kernels`` auto.

    Args:
        liger, compiled: names of switches, with blanks between them.
    """
    wanted = [name for name in liger.split() if reading.file.flag(name)]
    built = [name for name in compiled.split() if reading.file.flag(name)]
    for names, kind, text in ((built, "compile", ONE_KIND if wanted else COMPILE), (wanted, "liger", LIGER)):
        for name in names:
            reading.put("model.kernels", kind)
            reading.tell(name, text)


def read_division(reading: Reading, context: str, *, shards: str = "", copies: str = "") -> None:
    """How many processes work on a pack, and how many hold a copy of the model.

    Args:
        context, shards, copies: names of one key each, the newest first.
    """
    ranks = _size(reading, context, "-> train.context_parallel {}, by heads")
    among = _size(reading, shards, "-> shards of {}")
    of_one = "" if among else "; set train.shards_per_replica to the processes of one, else all share the model out"
    several = _size(reading, copies, f"{{}} copies of the model{of_one}")
    if several > 1 and among:
        # Processes that work on a pack together are shards, too.
        held = among * max(ranks, 1)
        reading.put("train.shards_per_replica", held, copies.split()[0])
    if ranks > 1:
        reading.put("train.context_parallel", ranks)


def _size(reading: Reading, names: str, text: str) -> int:
    """0 where the file is silent."""
    if not names:
        return 0
    named, given = reading.first(names, None)
    if given is None:
        return 0
    size = reading.file.as_whole(named, given)
    reading.tell(named, text.format(size) if size > 1 else "1 is how it is here")
    return size
