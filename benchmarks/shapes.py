"""The shapes that tests and benchmarks share.

Legend: T rows (completion tokens), D features, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

VOCAB_SIZES = (1, 2, 127, 128, 129, 1000, 32001, 50257)
ROW_COUNTS = (0, 1, 2, 127, 129)
FEATURES = (1, 33, 64, 127)


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


# Every vocabulary size and every row count, with features that divide nothing, and no product beyond a second of work.
TEST_SHAPES = tuple(
    HeadShape(T, D, V)
    for V, (T, D) in zip(
        VOCAB_SIZES * 2,
        itertools.islice(itertools.cycle(itertools.product(ROW_COUNTS[1:], (33, 1, 127))), 2 * len(VOCAB_SIZES)),
        strict=True,
    )
) + (HeadShape(0, 33, 129), HeadShape(129, 64, 1000))

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
GPU_BENCHMARK = HeadShape(8192, 4096, 128256)
