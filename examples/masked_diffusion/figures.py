"""The two pictures of the example, in the look of the engine's reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.report.style import CHOSEN, INK, MUTED, REJECTED, TRAIN, finish_steps, legend, new_figure, reference_line

from .train import Evaluation
from .variance import NAIVE, Variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE = {"marker": "o", "markersize": 5.0, "linewidth": 2.0, "clip_on": False}


def draw_training(evaluations: Sequence[Evaluation]) -> Figure:
    """Accuracy and margin on held-out pairs over the steps of DPO."""
    from matplotlib.ticker import PercentFormatter

    figure, (accuracy, margin) = new_figure(
        "A masked-diffusion model learns a preference", "DPO on ELBO estimates, held-out pairs", rows=2
    )
    steps = [found.step for found in evaluations]
    accuracy.plot(steps, [f.ranking_accuracy for f in evaluations], color=TRAIN, label="ranked right", **_CURVE)
    accuracy.plot(steps, [f.reward_accuracy for f in evaluations], color=CHOSEN, label="reward right", **_CURVE)
    accuracy.set_ylabel("% of pairs")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=""))
    margin.plot(steps, [f.margin for f in evaluations], color=CHOSEN, **_CURVE)
    margin.set_ylabel("margin (nats)")
    margin.set_xlabel("optimizer step")
    for panel in (accuracy, margin):
        finish_steps(panel, steps[0], steps[-1])
    accuracy.set_ylim(0.3, 1.05)
    reference_line(accuracy, 0.5, "chance")
    reference_line(margin, 0.0, "policy = reference")
    legend(accuracy)
    return figure


def draw_variance(variances: dict[str, Variance]) -> Figure:
    """Variance of the score by sampler, with masks of its own for each model and with shared ones."""
    figure, (axes,) = new_figure(
        "Variance of a preference score",
        "8 passes of a response; factors are against the upper right",
    )
    naive, names = variances[NAIVE].own, list(variances)
    for place, found in enumerate(variances.values()):
        axes.plot([found.shared, found.own], [place, place], color=MUTED, linewidth=1.2, zorder=1)
        for value, side, shift in ((found.shared, "right", -8), (found.own, "left", 8)):
            label = "" if value == naive else f"{naive / value:.2g}" if value > naive / 100 else f"{naive / value:.0f}"
            axes.annotate(
                label,
                (value, place),
                (shift, 0),
                textcoords="offset points",
                ha=side,
                va="center_baseline",
                fontsize=10,
                color=INK,
            )
    for attribute, label, colour in (
        ("shared", "masks shared by policy and reference", CHOSEN),
        ("own", "masks of their own", REJECTED),
    ):
        values = [getattr(found, attribute) for found in variances.values()]
        axes.plot(values, range(len(names)), linestyle="", marker="o", markersize=8, color=colour, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(y=0.08)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 3, high * 3)
    axes.set_xlabel("variance over masks (nats²)")
    legend(axes)
    return figure
