"""Held-out pairs that were judged more than once: how often each side was preferred, beside what the reward predicts.

The definitions are in docs/evaluation.md. Shape suffixes: P pairs as they stand in rows, each of which is one vote; D
distinct pairs of two votes or more.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np

from ..data.groups import PreferenceGroup
from .measures import CALIBRATION_BINS, mean_and_error

Pair = tuple[PreferenceGroup, int, int]
"""A group, and the places of the chosen and the rejected response in it."""


def judged_again(pairs: Iterable[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs have the same prompt and the same two responses, whichever of them was chosen.

    Returns:
        int64 [P], equal where the pairs are; bool [P], whether the first of the two in a fixed order is the chosen one.
    """
    known: dict[bytes, int] = {}
    places, first = [], []
    for group, chosen, rejected in pairs:
        parts = [group.prompt_ids, group.response_ids[chosen], group.response_ids[rejected]]
        prompt, *sides = (np.asarray(ids, np.int32).tobytes() for ids in parts)
        found = blake2b(digest_size=16)
        for text in (prompt, *sorted(sides)):
            found.update(len(text).to_bytes(8, "little") + text)
        places.append(known.setdefault(found.digest(), len(known)))
        first.append(sides[0] <= sides[1])
    return np.asarray(places, np.int64), np.asarray(first, bool)


def preference_shares(margins_P: np.ndarray, places_P: np.ndarray, first_P: np.ndarray) -> np.ndarray:
    """Of each pair of two votes or more, float64 [D, 3]: the probability that the reward gives the side that it prefers
    (0.5 or more), the share of votes for that side, and the votes.

    Args:
        margins_P: reward of the chosen response less that of the rejected one.
        places_P, first_P: of ``judged_again``.
    """
    votes = np.bincount(places_P)
    signed = np.where(first_P, margins_P, -margins_P)
    margins = np.bincount(places_P, signed) / np.maximum(votes, 1)
    share = np.bincount(places_P, first_P) / np.maximum(votes, 1)
    share = np.where(margins >= 0, share, 1 - share)
    predicted = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700.0)))
    return np.stack([predicted, share, votes], 1)[votes > 1]


def share_measures(shares_D3: np.ndarray) -> dict[str, float]:
    """``preference_share_error``, with its standard error, and ``num_repeated_pairs``; nothing where there is none.

    The squared distance of probability and share is too large by the variance of a share of few votes, of which
    ``share * (1 - share) / (votes - 1)`` is an unbiased estimate.
    """
    predicted, share, votes = shares_D3.T
    if not len(shares_D3):
        return {}
    found = mean_and_error("preference_share_error", (predicted - share) ** 2 - share * (1 - share) / (votes - 1))
    return found | {"num_repeated_pairs": float(len(shares_D3))}


def share_table(shares_D3: np.ndarray) -> list[dict[str, Any]]:
    """Means over bins of the predicted probability, as wide as those of the calibration; empty ones are left out, and
    so are pairs whose margin is no number."""
    predicted, share, votes = shares_D3[~np.isnan(shares_D3[:, 0])].T
    place = np.minimum(((predicted - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    found = []
    for each in np.unique(place):
        inside = place == each
        found.append(
            {
                "from": 0.5 + each / (2 * CALIBRATION_BINS),
                "to": 0.5 + (each + 1) / (2 * CALIBRATION_BINS),
                "pairs": float(inside.sum()),
                "votes": float(votes[inside].sum()),
                "predicted": float(predicted[inside].mean()),
                "observed": float(share[inside].mean()),
            }
        )
    return found
