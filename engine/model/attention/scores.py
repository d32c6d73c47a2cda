"""What a layer of a model does with its attention scores."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Options of one layer."""

    scaling: float
    """Factor of the scores."""
    window: int | None
    """A token attends to at most this many tokens, itself included."""
    softcap: float | None
    """Scores become ``softcap * tanh(scores / softcap)``."""
    sinks: Tensor | None
    """[H], one more score for every query of a head, whose value is zero."""
    chunk: int | None
    """A token attends to none before its chunk of this many."""
