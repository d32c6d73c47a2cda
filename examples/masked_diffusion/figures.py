"""The two pictures of the example, in the look of the engine's reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.report.style import CHOSEN, INK, MUTED, TRAIN, finish_steps, legend, new_figure, reference_line

from .train import Evaluation
from .variance import NAIVE, SAMPLERS, Variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE = {"marker": "o", "markersize": 5.0, "linewidth": 2.0}


def draw_training(evaluations: Sequence[Evaluation]) -> Figure:
    """Accuracy and margin on held-out pairs over the steps of DPO."""
    from matplotlib.ticker import PercentFormatter

    figure, (accuracy, margin) = new_figure(
        "A masked-diffusion model learns a preference", "held-out pairs, by ELBO estimates on fixed masks", rows=2
    )
    figure.set_size_inches(6.4, 6.0)
    steps = [found.step for found in evaluations]
    accuracy.plot(steps, [f.ranking_accuracy for f in evaluations], color=TRAIN, label="ranked right", **_CURVE)
    accuracy.plot(steps, [f.reward_accuracy for f in evaluations], color=CHOSEN, label="reward right", **_CURVE)
    accuracy.set_ylabel("accuracy (% of pairs)")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=""))
    margin.plot(steps, [f.margin for f in evaluations], color=CHOSEN, **_CURVE)
    margin.set_ylabel("ELBO margin (nats)")
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
    names = list(variances)
    figure, (axes,) = new_figure(
        "Variance of a preference score", "8 passes of each response and model; smaller is better"
    )
    figure.set_size_inches(6.4, 5.4)
    height = 0.38
    for offset, attribute, label, colour in (
        (-height / 2, "own", "own masks", MUTED),
        (height / 2, "shared", "masks shared by policy and reference", CHOSEN),
    ):
        values = [getattr(variances[name], attribute) for name in names]
        bars = axes.barh([place + offset for place in range(len(names))], values, height, color=colour, label=label)
        factors = [f"{variances[NAIVE].own / value:.3g}x less" for value in values]
        factors = [
            "" if name == NAIVE and attribute == "own" else text for name, text in zip(names, factors, strict=True)
        ]
        axes.bar_label(bars, factors, padding=3, fontsize=9.5, color=INK)
    axes.set_yticks(range(len(names)), [f"{SAMPLERS[name].form}:\n{name}" for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=3 * axes.get_xlim()[1])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("variance of the score over masks (nats², log scale)")
    legend(axes)
    return figure
