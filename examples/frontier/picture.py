"""The two pictures: reward against divergence by method, and of DPO by the number of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from engine.report.style import INK, MUTED, legend, new_figure

from .curves import frontier, select
from .exact import Point, best_reward
from .methods import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "dpo": "DPO",
    "ipo": "IPO",
    "preferred-ft": "Preferred-FT",
    "unlikelihood": "Unlikelihood",
    "simpo": "SimPO",
}
STYLES = {
    "dpo": ("#1d5fa8", "o"),
    "ipo": ("#d1782c", "s"),
    "preferred-ft": ("#4c9f70", "^"),
    "unlikelihood": ("#b8475a", "v"),
    "simpo": ("#7a5195", "D"),
}
CLOSED_FORM = "closed form"
SHADES = ("#a9c6e6", "#5f97d0", "#164a85")
"""Of DPO, from the fewest pairs to the most."""
SHOWN_KL = 1.25
"""Where the x axis ends, in units of the largest divergence that DPO's frontier reaches."""


def draw_frontiers(
    path: Path, evaluations: Sequence[Evaluation], start: Point, ref_logps: Tensor, rewards: Tensor
) -> None:
    """Every evaluation of every method as a point, the frontier of each as a line, below the closed form."""
    most = max(one.pairs for one in evaluations)
    curves = {method: select(evaluations, method, most) for method in LABELS}
    end = SHOWN_KL * frontier(curves["dpo"], start)[-1, 0]
    figure, (axes,) = new_figure(
        "Reward against divergence, exactly",
        f"means over all answers; a point per evaluation; {most:,} pairs",
        labels=[CLOSED_FORM, *LABELS.values()],
    )
    _closed_form(axes, end, ref_logps, rewards)
    for method, points in curves.items():
        colour, marker = STYLES[method]
        _curve(axes, points, start, LABELS[method], colour, marker)
    _finish(axes, end, start)
    figure.savefig(path)


def draw_by_pairs(
    path: Path,
    evaluations: Sequence[Evaluation],
    shares: Mapping[int, float],
    start: Point,
    ref_logps: Tensor,
    rewards: Tensor,
) -> None:
    """DPO's points and frontier for each number of pairs. ``shares`` are those of ``curves.by_pairs``."""
    end = SHOWN_KL * max(frontier(select(evaluations, "dpo", pairs), start)[-1, 0] for pairs in shares)
    names = [f"{pairs:,} pairs: {share:.0%}" for pairs, share in shares.items()]
    figure, (axes,) = new_figure(
        "DPO nears the closed form with data",
        "equally many steps; share of the gain at equal divergence",
        labels=[CLOSED_FORM, *names],
    )
    _closed_form(axes, end, ref_logps, rewards)
    for pairs, name, shade in zip(shares, names, SHADES[-len(shares) :], strict=True):
        _curve(axes, select(evaluations, "dpo", pairs), start, name, shade, "o")
    _finish(axes, end, start)
    figure.savefig(path)


def _closed_form(axes: Axes, end: float, ref_logps: Tensor, rewards: Tensor) -> None:
    kls = np.concatenate([[1e-6], np.linspace(0.0, 1.0, 80)[1:] ** 2 * end])
    best = [best_reward(kl, ref_logps, rewards) for kl in kls]
    axes.plot(kls, best, color=INK, linewidth=2.4, label=CLOSED_FORM, zorder=3)


def _curve(axes: Axes, points: Sequence[Point], start: Point, label: str, colour: str, marker: str) -> None:
    hull = frontier(points, start)
    axes.plot(*np.array(points).T, marker, color=colour, alpha=0.5, markersize=4.5, markeredgewidth=0, zorder=2)
    axes.plot(*hull.T, color=colour, marker=marker, markersize=5.0, linewidth=1.6, label=label, zorder=4)


def _finish(axes: Axes, end: float, start: Point) -> None:
    axes.plot(0, start.reward, "o", color=MUTED, markersize=8, zorder=5)
    axes.annotate("reference", (0, start.reward), xytext=(9, -3), textcoords="offset points", va="top", color=MUTED)
    axes.set_xlim(-0.02 * end, end)
    axes.set_ylim(bottom=start.reward - 1.5)
    axes.set_xlabel("KL(policy || reference) of an answer, nats")
    axes.set_ylabel("expected reward of an answer")
    legend(axes)
