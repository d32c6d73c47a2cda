"""Token counts of many groups, flat: a million groups are two arrays and not a million small ones.

Shape suffixes: G groups, P parts (prompts and responses).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


class GroupLengths(Sequence[np.ndarray]):
    """Per group, int64 [1 + K] = (prompt tokens, response tokens...); as a sequence, or for all groups at once.

    Args:
        sizes_P: int64 [P]: tokens of each part, group after group.
        first_G1: int64 [G + 1]: where each group starts in ``sizes_P``.
    """

    def __init__(self, sizes_P: np.ndarray, first_G1: np.ndarray):
        self.sizes_P = sizes_P
        self.first_G1 = first_G1

    @classmethod
    def of(cls, lengths: Sequence[np.ndarray]) -> GroupLengths:
        """``lengths`` itself when it is flat already."""
        if isinstance(lengths, cls):
            return lengths
        first_G1 = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, lengths), np.int64, len(lengths)), out=first_G1[1:])
        sizes_P = np.concatenate(lengths).astype(np.int64) if len(lengths) else np.zeros(0, np.int64)
        return cls(sizes_P, first_G1)

    def take(self, groups: np.ndarray) -> GroupLengths:
        """Those of some groups, by their places, in that order; one may come more than once."""
        counts = np.diff(self.first_G1)[groups]
        first_G1 = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        parts = np.repeat(self.first_G1[groups] - first_G1[:-1], counts) + np.arange(first_G1[-1])
        return GroupLengths(self.sizes_P[parts], first_G1)

    def of_first_responses(self) -> GroupLengths:
        """Those of each group with its first response alone."""
        first_G = self.first_G1[:-1]
        sizes_P = np.stack([self.sizes_P[first_G], self.sizes_P[first_G + 1]], 1).reshape(-1)
        return GroupLengths(sizes_P, np.arange(0, 2 * len(self) + 2, 2))

    def __len__(self) -> int:
        return len(self.first_G1) - 1

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.sizes_P[self.first_G1[index] : self.first_G1[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        bounds = self.first_G1.tolist()
        return (self.sizes_P[a:b] for a, b in pairwise(bounds))

    @property
    def prompts(self) -> np.ndarray:
        """Tokens of each prompt."""
        return self.sizes_P[self.first_G1[:-1]]

    @property
    def responses(self) -> np.ndarray:
        """Number of responses of each group."""
        return np.diff(self.first_G1) - 1

    @property
    def completions(self) -> np.ndarray:
        """Tokens of all responses of each group."""
        return self._sum(self.sizes_P) - self.prompts

    @property
    def longest(self) -> np.ndarray:
        """Tokens of the longest response of each group; each needs at least one."""
        if not len(self):
            return np.zeros(0, np.int64)
        sizes_P = self.sizes_P.copy()
        sizes_P[self.first_G1[:-1]] = 0
        return np.maximum.reduceat(sizes_P, self.first_G1[:-1])

    def packed(self, *, share_prompts: bool) -> np.ndarray:
        """Tokens of each group in a pack, its prompt laid out once or once per response."""
        return self.prompts * (1 if share_prompts else self.responses) + self.completions

    def visible_pairs(self, *, share_prompts: bool) -> np.ndarray:
        """Query-key pairs that causal attention looks at in each group."""
        prompts_G = self.prompts
        triangles_P = self.sizes_P * (self.sizes_P + 1) // 2
        prompt_pairs_G = triangles_P[self.first_G1[:-1]]
        response_pairs_G = self._sum(triangles_P) - prompt_pairs_G + prompts_G * self.completions
        return response_pairs_G + prompt_pairs_G * (1 if share_prompts else self.responses)

    def _sum(self, values_P: np.ndarray) -> np.ndarray:
        total_P1 = np.concatenate([[0], np.cumsum(values_P, dtype=np.int64)])
        return total_P1[self.first_G1[1:]] - total_P1[self.first_G1[:-1]]
