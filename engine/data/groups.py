"""What the rest of the engine sees of the data: token ids, a shared prompt, ranked responses.

``PreferenceDataset`` keeps all token ids in one flat array, so that a million rows are a few large buffers and not
millions of Python objects.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import numpy as np

from .lengths import GroupLengths
from .mixture import Mixture


@dataclass(frozen=True, eq=False)
class PreferenceGroup:
    """One prompt and K responses, best first. Two of them are a pair: the first chosen, the second rejected."""

    row: int
    """0-based row in the source, for messages."""
    prompt_ids: np.ndarray
    """int32 [P], at least one token."""
    response_ids: tuple[np.ndarray, ...]
    """K arrays, int32 [R_k], each at least one token."""
    ref_logps: tuple[float, ...] | None = None
    """Reference log-prob sums that came with the row (``ref_chosen_logps``, ``ref_rejected_logps``), or None."""
    pairs: tuple[tuple[int, int], ...] | None = None
    """The (chosen, rejected) places in ``response_ids`` that more than two responses stand for; None: their ranking."""
    weight: float = 1.0
    """What the losses of the group are multiplied by, 0 or more."""
    margin: float = 0.0
    """By how much the reward margin of each of its pairs is to be exceeded."""
    token_weights: tuple[np.ndarray, ...] | None = None
    """K arrays, float32 [R_k]: what the log-probs of tokens are multiplied by before they are summed. Tokens of weight
    0 are as if they were not there: in no sum and no length; one of each response counts. None: all count alike."""
    source: str = ""
    """Which set of a mixture it is of; empty where there is one set."""
    desirable: bool | None = None
    """Whether the first response of an unpaired row is a good one; None where responses are compared. A second one is
    another row's, for the divergence of KTO (``engine/train/mismatched.py``)."""
    cut: tuple[np.ndarray, ...] | None = None
    """int32 of each response: what ``data.max_length`` cut off, where that is kept."""

    @property
    def whole(self) -> PreferenceGroup:
        """The group with every token counted alike."""
        return self if self.token_weights is None else replace(self, token_weights=None)

    @property
    def label(self) -> int | str:
        """The row for messages: its number, in a mixture also its set, such as ``5 of ultrafeedback``."""
        return f"{self.row} of {self.source}" if self.source else self.row


_ARRAYS = {
    **{name: f"_{name}" for name in ("tokens", "offsets", "first_part", "rows", "pairs", "first_pair", "weights")},
    **{name: name for name in ("sources", "weights_G", "margins_G")},
}
"""The arrays of a dataset, and the attributes that hold them."""


class PreferenceDataset(Sequence[PreferenceGroup]):
    """Groups in source order, backed by flat arrays.

    ``lengths`` gives, for each group, the number of tokens of its prompt and of each response, without touching ids.

    Args:
        groups: of one set, or of the sets of a mixture, one after the other.
        mixture: how much of each set an epoch takes; None takes every group once.
    """

    def __init__(self, groups: Iterable[PreferenceGroup], mixture: Mixture | None = None):
        self.mixture = mixture
        self.pass_rows: int | None = None
        """Of a first window: the rows of the whole stream, where that is known."""
        tokens: array[int] = array("i")
        sizes: array[int] = array("q")
        first_part: array[int] = array("q", [0])
        rows: array[int] = array("q")
        pairs: array[int] = array("h")
        first_pair: array[int] = array("q", [0])
        places: dict[str, int] = {}
        sources: array[int] = array("h")
        self.ref_logps: list[tuple[float, ...] | None] = []
        """``PreferenceGroup.ref_logps`` of each."""
        self._cut: dict[int, tuple[np.ndarray, ...]] = {}
        labels: array[int] = array("b")
        numbers: array[float] = array("d")
        weights: array[float] | None = None
        for group in groups:
            if group.token_weights is not None and weights is None:
                weights = array("f", [1.0]) * len(tokens)
            if weights is not None:
                given = group.token_weights or tuple(np.ones(len(ids)) for ids in group.response_ids)
                for values in (np.ones(len(group.prompt_ids)), *given):
                    weights.frombytes(np.ascontiguousarray(values, dtype=np.float32).tobytes())
            numbers.extend((group.weight, group.margin))
            for ids in (group.prompt_ids, *group.response_ids):
                tokens.frombytes(np.ascontiguousarray(ids, dtype=np.int32).tobytes())
                sizes.append(len(ids))
            first_part.append(len(sizes))
            rows.append(group.row)
            sources.append(places.setdefault(group.source, len(places)))
            self.ref_logps.append(group.ref_logps)
            labels.append(-1 if group.desirable is None else group.desirable)
            if group.cut is not None and any(map(len, group.cut)):
                self._cut[len(labels) - 1] = group.cut
            pairs.extend(place for pair in group.pairs or () for place in pair)
            first_pair.append(len(pairs) // 2)
        self._tokens = np.asarray(tokens, dtype=np.int32)
        self._offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._first_part = np.asarray(first_part, dtype=np.int64)
        self._rows = np.asarray(rows, dtype=np.int64)
        self.source_names = () if set(places) <= {""} else tuple(places)
        """The sets of a mixture, in order; empty where there is one set."""
        self.sources = np.asarray(sources, dtype=np.int64)
        """int64 [G]: the place in ``source_names`` of each group's set."""
        self._pairs = np.asarray(pairs, dtype=np.int16).reshape(-1, 2)
        self._first_pair = np.asarray(first_pair, dtype=np.int64)
        self._label(np.asarray(labels, dtype=np.int8))
        self._weights = None if weights is None else np.asarray(weights, dtype=np.float32)
        self.weights_G, self.margins_G = np.asarray(numbers, dtype=np.float64).reshape(-1, 2).T
        """float64 [G] each: ``PreferenceGroup.weight`` and ``margin``."""

    def _label(self, labels_G: np.ndarray) -> None:
        self._labels = labels_G
        self.labelled_G, self.desirable_G = labels_G >= 0, labels_G > 0
        """bool [G] each: whether a group is an unpaired row, and whether its label says that it is desirable."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All numbers of the groups but reference log-probs, by name, for ``of_arrays``."""
        found = {name: getattr(self, place) for name, place in _ARRAYS.items()}
        return {name: values for name, values in found.items() if values is not None}

    @classmethod
    def of_arrays(
        cls, arrays: Mapping[str, np.ndarray], ref_logps: list[tuple[float, ...] | None], source_names: tuple[str, ...]
    ) -> PreferenceDataset:
        """The dataset that ``arrays`` are of, without its mixture and labels; it keeps them and copies nothing."""
        dataset = cls(())
        for name, place in _ARRAYS.items():
            setattr(dataset, place, arrays.get(name))
        dataset._pairs = dataset._pairs.reshape(-1, 2)
        dataset.ref_logps, dataset.source_names = ref_logps, source_names
        dataset._label(np.full(len(ref_logps), -1, np.int8))
        return dataset

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        first, last = self._first_part[index], self._first_part[index + 1]
        parts = self._parts(self._tokens, first, last)
        return PreferenceGroup(
            row=int(self._rows[index]),
            prompt_ids=parts[0],
            response_ids=tuple(parts[1:]),
            ref_logps=self.ref_logps[index],
            pairs=self._pairs_of(index),
            weight=float(self.weights_G[index]),
            margin=float(self.margins_G[index]),
            token_weights=None if self._weights is None else tuple(self._parts(self._weights, first + 1, last)),
            source=self.source_names[self.sources[index]] if self.source_names else "",
            desirable=bool(self.desirable_G[index]) if self.labelled_G[index] else None,
            cut=self._cut.get(index),
        )

    def _parts(self, values: np.ndarray, first: int, last: int) -> list[np.ndarray]:
        return [values[self._offsets[p] : self._offsets[p + 1]] for p in range(first, last)]

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count differently."""
        return self._weights is not None

    @property
    def has_fractions(self) -> bool:
        """Whether tokens have other weights than 0 and 1."""
        return self._weights is not None and bool(((self._weights != 0) & (self._weights != 1)).any())

    @property
    def has_numbers(self) -> bool:
        """Whether a row has a weight, a margin, or tokens that count differently."""
        return self.weighs_tokens or bool((self.weights_G != 1).any() or (self.margins_G != 0).any())

    @property
    def per_epoch(self) -> int:
        """Groups of an epoch; in a mixture, one that comes twice counts twice."""
        return self.mixture.per_epoch if self.mixture is not None else self.pass_rows or len(self)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [per_epoch]: the groups of an epoch, before they are shuffled; a function of the arguments alone."""
        return np.arange(len(self)) if self.mixture is None else self.mixture.draw(seed, epoch)

    def only(self, places: np.ndarray) -> PreferenceDataset:
        """A mixture with some of its groups alone, ascending, whose epochs take no other; the digest is that of all."""
        assert self.mixture is not None
        assert self.mixture.kept is None
        part = PreferenceDataset((self[i] for i in places.tolist()), replace(self.mixture, kept=places))
        part.digest = self.digest
        return part

    def _pairs_of(self, index: int) -> tuple[tuple[int, int], ...] | None:
        pairs = self._pairs[self._first_pair[index] : self._first_pair[index + 1]].tolist()
        return tuple((a, b) for a, b in pairs) or None

    @property
    def has_pairs(self) -> np.ndarray:
        """bool [G]: whether a group stands for pairs of its own (``PreferenceGroup.pairs``)."""
        return np.diff(self._first_pair) > 0

    @property
    def terms(self) -> np.ndarray:
        """int64 [G]: losses that each group adds to the sum of a step: one for each of its pairs, or one in all."""
        return np.maximum(np.diff(self._first_pair), 1)

    def __iter__(self) -> Iterator[PreferenceGroup]:
        return (self[i] for i in range(len(self)))

    def ending_without(self, tokens: Collection[int]) -> np.ndarray:
        """Places of the groups with a response whose last two tokens are none of ``tokens``."""
        last, wanted = self._offsets[1:] - 1, np.array(sorted(tokens), np.int64)
        ends = np.isin(self._tokens[last], wanted)
        ends |= np.isin(self._tokens[np.maximum(last - 1, 0)], wanted) & (np.diff(self._offsets) > 1)
        ends[self._first_part[:-1]] = True
        return np.flatnonzero(~np.logical_and.reduceat(ends, self._first_part[:-1]))

    @property
    def largest_id(self) -> int:
        """The largest token id; -1 when there is none."""
        return int(self._tokens.max(initial=-1))

    @cached_property
    def lengths(self) -> GroupLengths:
        """Per group: int64 [1 + K] = (prompt tokens, response tokens...)."""
        return GroupLengths(np.diff(self._offsets), self._first_part)

    @property
    def trained(self) -> GroupLengths:
        """``lengths`` of what is learned from: without another row's response."""
        return self.lengths.of_first_responses() if self.labelled_G.any() else self.lengths

    @cached_property
    def counted(self) -> GroupLengths:
        """``lengths`` without the tokens of weight 0."""
        if self._weights is None:
            return self.lengths
        total = np.concatenate([[0], np.cumsum(self._weights != 0, dtype=np.int64)])
        return GroupLengths(np.diff(total[self._offsets]), self._first_part)

    @cached_property
    def digest(self) -> str:
        """sha256 of every token, row number, boundary and pair, and of what has weights or margins."""
        hasher = sha256()
        for numbers, kind in (
            (np.array([len(self)]), "<i8"),
            (self._first_part, "<i8"),
            (self._rows, "<i8"),
            (self._offsets, "<i8"),
            (self._tokens, "<i4"),
            (self._first_pair, "<i8"),
            (self._pairs, "<i2"),
        ):
            hasher.update(np.ascontiguousarray(numbers, kind).data)
        if self.has_numbers:
            for values in (self.weights_G, self.margins_G, self._weights):
                hasher.update(b"" if values is None else np.ascontiguousarray(values, "<f8").data)
        if self.labelled_G.any():
            hasher.update(self._labels.data)
        if self.mixture is not None:
            hasher.update(json.dumps([self.mixture.sizes, self.mixture.counts]).encode())
        return hasher.hexdigest()


def split_mismatched(
    groups: Sequence[PreferenceGroup],
) -> tuple[Sequence[PreferenceGroup], Sequence[PreferenceGroup] | None]:
    """Unpaired rows with their own response alone, and with another row's; groups of others, and None."""
    if groups[0].desirable is None or len(groups[0].response_ids) == 1:
        return groups, None
    own, other = ([replace(g, response_ids=g.response_ids[k : k + 1]) for g in groups] for k in (0, 1))
    return own, other


def pair_places(groups: Sequence[PreferenceGroup]) -> np.ndarray | None:
    """int64 [P, 2]: (chosen, rejected) responses of every pair, counted over all groups in order.

    Returns:
        None when no group stands for pairs of its own: each is one pair, or one ranking.
    """
    places, first = [], 0
    own = False
    for group in groups:
        own = own or group.pairs is not None
        places.append(first + np.array(group.pairs or ((0, 1),), np.int64))
        first += len(group.response_ids)
    return np.concatenate(places) if own else None
