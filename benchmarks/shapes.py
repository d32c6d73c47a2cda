"""The shapes that tests and benchmarks share.

Legend: T rows (completion tokens), D features, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple


class HeadShape(NamedTuple):
    """Sizes of one lm_head product."""

    T: int
    D: int
    V: int

    @property
    def flop(self) -> int:
        """Operations of the product, the unit in which work is stated."""
        return 2 * self.T * self.D * self.V

    def __str__(self) -> str:
        return f"T{self.T}-D{self.D}-V{self.V}"


TEST_SHAPES = tuple(
    HeadShape(T, D, V)
    for T, D, V in (
        (127, 33, 1),
        (129, 1, 2),
        (2, 127, 127),
        (127, 64, 128),
        (129, 33, 129),
        (129, 127, 1000),
        (2, 33, 32001),
        (1, 17, 50257),
        (127, 5, 50257),
        (1, 1, 1),
        (1, 33, 129),
        (0, 33, 129),
    )
)
"""Vocabularies at, below and above tile edges; row counts 0, 1, 2, 127, 129; features that divide nothing."""

RESPONSE_LENGTHS = {
    "even": (4, 4, 4, 4),
    "uneven": (3, 17, 9, 1, 30, 2),
    "one token each": (1, 1, 1, 1),
    "one empty response": (5, 0, 0, 6),
    "all empty": (0, 0),
    "a long pair between short ones": (2, 3, 40, 25, 1, 4),
    "no pair": (),
}
"""Tokens of chosen_0, rejected_0, chosen_1, ..."""

CPU_BENCHMARK = HeadShape(1024, 896, 37984)
SMALL_CPU_BENCHMARK = HeadShape(1024, 256, 16384)
GPU_BENCHMARK = HeadShape(8192, 4096, 128256)
