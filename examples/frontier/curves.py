"""From points to curves that can be compared at equal divergence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .exact import Point, best_reward
from .methods import Evaluation

LOWEST_KL = 0.1
"""Nats from which curves are compared: below, all methods have hardly moved."""
GRID = 25
"""Divergences at which they are."""


def frontier(points: Sequence[Point], start: Point) -> np.ndarray:
    """The upper concave envelope of ``start`` and ``points``: float64 [n, 2] of KL and reward, rising in both.

    Every point of it can be reached: to answer with one of two policies, drawn anew for each answer, has the mean of
    their rewards and at most the mean of their divergences, since KL is convex in the policy. So all methods are
    judged by the best that they have shown.
    """
    hull: list[Point] = []
    for new in sorted({start, *points}):
        while len(hull) > 1 and _below(hull[-2], hull[-1], new):
            hull.pop()
        hull.append(new)
    top = max(range(len(hull)), key=lambda place: hull[place].reward)
    return np.array(hull[: top + 1], dtype=np.float64)


def _below(left: Point, middle: Point, right: Point) -> bool:
    """Whether ``middle`` is not above the line from ``left`` to ``right``."""
    rise = (middle.reward - left.reward) * (right.kl - left.kl)
    return rise <= (right.reward - left.reward) * (middle.kl - left.kl)


def attained(points: Sequence[Point], start: Point, kls: np.ndarray, ref_logps: Tensor, rewards: Tensor) -> np.ndarray:
    """Of the reward that a policy can gain over the reference at each KL, the share that the points' frontier gains."""
    curve = frontier(points, start)
    best = np.array([best_reward(kl, ref_logps, rewards) for kl in kls])
    return (np.interp(kls, *curve.T) - start.reward) / (best - start.reward)


def shared_range(*curves: Sequence[Point], start: Point) -> np.ndarray:
    """Divergences that the frontiers of all have reached."""
    top = min(frontier(points, start)[-1, 0] for points in curves)
    return np.linspace(min(LOWEST_KL, top / 2), top, GRID)


def select(evaluations: Sequence[Evaluation], method: str, pairs: int) -> list[Point]:
    return [one.point for one in evaluations if one.method == method and one.pairs == pairs]


def compare(
    evaluations: Sequence[Evaluation], start: Point, ref_logps: Tensor, rewards: Tensor
) -> dict[str, dict[str, float]]:
    """For each method but DPO, from all pairs: ``to_kl``, and over divergences up to it the mean share of the optimum's
    gain that DPO (``dpo``) and the method (``other``) attain, and the share of divergences at which DPO is above."""
    most = max(one.pairs for one in evaluations)
    ours, found = select(evaluations, "dpo", most), {}
    for method in dict.fromkeys(one.method for one in evaluations if one.method != "dpo"):
        theirs = select(evaluations, method, most)
        kls = shared_range(ours, theirs, start=start)
        shares = [attained(points, start, kls, ref_logps, rewards) for points in (ours, theirs)]
        found[method] = {
            "to_kl": float(kls[-1]),
            "dpo": float(shares[0].mean()),
            "other": float(shares[1].mean()),
            "above": float((shares[0] > shares[1]).mean()),
        }
    return found


def by_pairs(evaluations: Sequence[Evaluation], start: Point, ref_logps: Tensor, rewards: Tensor) -> dict[int, float]:
    """Number of pairs -> mean share of the optimum's gain that DPO attains, over divergences that all numbers reach."""
    curves = {
        pairs: select(evaluations, "dpo", pairs)
        for pairs in sorted({one.pairs for one in evaluations if one.method == "dpo"})
    }
    kls = shared_range(*curves.values(), start=start)
    return {pairs: float(attained(points, start, kls, ref_logps, rewards).mean()) for pairs, points in curves.items()}
