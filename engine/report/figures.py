"""One function per picture: run records in, a matplotlib figure out, or None when the run logged nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ..run_folder import EXPERT_LAYER, EXPERTS, TRAIN_SOURCE, of_sources
from .style import (
    CHOSEN,
    EVALS,
    INK,
    MUTED,
    REJECTED,
    TRAIN,
    Strand,
    draw_evaluation,
    draw_series,
    finish_steps,
    legend,
    new_figure,
    reference_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .records import RunRecords

LN2_LOSSES = ("sigmoid", "sigmoid_norm", "robust")
"""Losses that are ln 2 for every pair while the policy equals the reference."""
_SETS_DRAWN, _LABEL_WIDTH = 8, 30
_RIGHT = "is on the side of beta x divergence that its label says"
_LOADS = (("busiest", REJECTED), ("idlest", CHOSEN))


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file name without suffix, what it shows, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[RunRecords], Figure | None]
    alone: str | None = None
    """The caption where the loss has no reference; None where it is the same."""
    of_rows: str | None = None
    """The caption of rows that are each desirable or not; None where it is the same."""

    def words(self, run: RunRecords) -> str:
        """The caption for a run."""
        if self.of_rows is not None and run.unit == "rows":
            return self.of_rows
        return self.caption if self.alone is None or run.has_reference else self.alone


def loss(run: RunRecords) -> Figure | None:
    if all(run.series(name) is None for name in _names(run, "loss")):
        return None
    settings = run.config.get("loss", {})
    loss_type = " + ".join(run.loss_types)
    figure, (axes,) = new_figure("Loss", f"{loss_type}, mean over {run.unit} (nats per {run.unit[:-1]})")
    _train_and_evaluation(axes, run, "loss")
    _label(axes, run, "loss (nats)")
    # A weight scales the start as well.
    if loss_type in LN2_LOSSES and not settings.get("loss_weights"):
        reference_line(axes, math.log(2), "ln 2: policy = reference")
    return figure


def margins(run: RunRecords) -> Figure | None:
    if not _has(run, "rewards/margins"):
        return None
    words = "chosen reward minus rejected reward, mean over pairs"
    if run.unit == "rows":
        words = "mean reward of desirable rows minus that of the others"
    figure, (axes,) = new_figure("Reward margin", words)
    _train_and_evaluation(axes, run, "rewards/margins")
    _label(axes, run, "margin (nats x beta)")
    reference_line(axes, 0.0, "policy = reference" if run.has_reference else "both alike")
    return figure


def accuracies(run: RunRecords) -> Figure | None:
    from matplotlib.ticker import PercentFormatter

    if not _has(run, "rewards/accuracies"):
        return None
    pairs = run.unit == "pairs"
    words = "share of pairs whose chosen response has the higher reward"
    figure, (axes,) = new_figure("Reward accuracy", words if pairs else f"share of rows whose reward {_RIGHT}")
    _train_and_evaluation(axes, run, "rewards/accuracies")
    _label(axes, run, f"accuracy (% of {run.unit})")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=""))
    if pairs:
        reference_line(axes, 0.5, "chance")
    return figure


def divergence(run: RunRecords) -> Figure | None:
    """What KTO measures rewards from."""
    if not _has(run, "kl"):
        return None
    words = "estimate from completions under each other's prompts, of whole steps; at least 0"
    figure, (axes,) = new_figure("Divergence from the reference", words)
    _train_and_evaluation(axes, run, "kl")
    _label(axes, run, "kl (nats)")
    return figure


def rewards(run: RunRecords) -> Figure | None:
    figure = _chosen_and_rejected(
        run,
        "rewards",
        title="Rewards",
        subtitle=_reward_words(run),
        label="reward (nats x beta)",
    )
    if figure is not None and run.has_reference:
        reference_line(figure.axes[0], 0.0, "policy = reference")
    return figure


def _reward_words(run: RunRecords) -> str:
    if run.has_reference:
        return "beta x (policy log-prob - reference log-prob), mean over responses"
    of = "mean policy log-prob of a token" if "simpo" in run.loss_types else "policy log-prob"
    return f"beta x {of}, mean over responses; this loss has no reference"


def logps(run: RunRecords) -> Figure | None:
    return _chosen_and_rejected(
        run,
        "logps",
        title="Log-probabilities",
        subtitle="policy log-prob of whole responses, mean over responses",
        label="log-prob (nats per response)",
    )


def optimizer(run: RunRecords) -> Figure | None:
    panels = [
        (name, label, colour)
        for name, label, colour in (
            ("learning_rate", "learning rate", TRAIN),
            ("grad_norm", "gradient norm", TRAIN),
        )
        if _has(run, name)
    ]
    if not panels:
        return None
    figure, axes = new_figure("Optimizer", "learning rate, and gradient norm before clipping", rows=len(panels))
    for panel, (name, label, colour) in zip(axes, panels, strict=True):
        series = run.series(name)
        assert series is not None
        draw_series(panel, series, label, colour)
        _label(panel, run, label, last=panel is axes[-1])
        if name == "learning_rate":
            configured = run.config.get("optim", {}).get("learning_rate") or 0.0
            panel.set_ylim(0, 1.12 * (max(series.finite.max(), configured) or 1.0))
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            continue
        if _spread(series.finite) > 30:
            panel.set_yscale("log")
        limit = run.config.get("optim", {}).get("max_grad_norm")
        # A limit far above the data would flatten the curve it is there to explain.
        if limit and len(series.finite) and series.finite.max() > 0.5 * limit:
            reference_line(panel, float(limit), f"clipped above {limit:g}")
    return figure


def throughput(run: RunRecords) -> Figure | None:
    panels: list[tuple[str, list[tuple[str, str, str]], float]] = [
        ("tokens / s", [("perf/tokens_per_second", "tokens", TRAIN)], 1.0),
        (f"{run.unit} / s", [("perf/pairs_per_second", run.unit, TRAIN)], 1.0),
        (
            "% of tokens",
            [
                ("perf/padding_fraction", "padding", REJECTED),
                ("perf/mixer_padding", "padding of mixers", TRAIN),
                ("perf/shared_fraction", "saved by prompt sharing", CHOSEN),
            ],
            100.0,
        ),
        ("MFU (%)", [("perf/mfu", "model FLOP utilisation", TRAIN)], 100.0),
        ("memory (GiB)", [("perf/peak_memory_gib", "peak memory", TRAIN)], 1.0),
    ]
    drawn = [(label, lines, factor) for label, lines, factor in panels if any(_has(run, name) for name, _, _ in lines)]
    if not drawn:
        return None
    figure, axes = new_figure("Throughput", "per logged interval", rows=len(drawn))
    for panel, (label, lines, factor) in zip(axes, drawn, strict=True):
        for name, line_label, colour in lines:
            series = run.series(name)
            if series is not None and len(series.finite):
                draw_series(panel, type(series)(series.steps, factor * series.values), line_label, colour)
        _label(panel, run, label, last=panel is axes[-1])
        # Not the edge that the data gave: a flat line would lie on it.
        panel.set_ylim(0, 1.1 * max(float(np.nanmax(line.get_ydata())) for line in panel.get_lines()) or 1.0)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    return figure


def sets(run: RunRecords) -> Figure | None:
    """Margin and accuracy of each set of a mixture, while training."""
    import matplotlib

    pairs: dict[str, float] = {}
    for row in run.rows:
        for label, metrics in of_sources(TRAIN_SOURCE, row).items():
            pairs[label] = pairs.get(label, 0.0) + (metrics.get("num_pairs") or 0.0)
    shown = sorted(pairs, key=lambda label: -pairs[label])[:_SETS_DRAWN]
    if not shown:
        return None
    more = f"; the {len(shown)} with the most {run.unit} of {len(pairs)}" if len(pairs) > len(shown) else ""
    figure, axes = new_figure(
        "Sets of the mixture", f"training {run.unit} of each set, mean over a logged interval{more}", rows=2
    )
    colours = [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["tab10"].colors]  # type: ignore[attr-defined]
    panels = (("rewards/margins", "reward margin"), ("rewards/accuracies", "accuracy"))
    for panel, (name, words) in zip(axes, panels, strict=True):
        for place, (label, colour) in enumerate(zip(shown, colours, strict=False)):
            series = run.series(f"{TRAIN_SOURCE}{label}/{name}")
            if series is not None and len(series.finite):
                draw_series(panel, series, label[:_LABEL_WIDTH], colour, Strand(place, len(shown)))
        finish_steps(panel, run.first_step, run.last_step)
        panel.set_ylabel(words)
    legend(axes[0])
    axes[-1].set_xlabel("optimizer step")
    return figure


def experts(run: RunRecords) -> Figure | None:
    """How evenly a mixture spreads its tokens."""
    if not all(_has(run, EXPERTS + side) for side, _ in _LOADS):
        return None
    balanced = _has(run, "aux_loss")
    subtitle = "share of a layer's tokens of its busiest and idlest expert; extremes over layers"
    figure, axes = new_figure("Expert load", subtitle, rows=1 + balanced)
    for side, colour in _LOADS:
        series = run.series(EXPERTS + side)
        assert series is not None
        draw_series(axes[0], type(series)(series.steps, 100 * series.values), f"{side} expert", colour)
    _label(axes[0], run, "% of tokens", last=not balanced)
    axes[0].set_ylim(bottom=0)
    if balanced:
        _train_and_evaluation(axes[1], run, "aux_loss")
        _label(axes[1], run, "load-balancing loss")
    return figure


def expert_layers(run: RunRecords) -> Figure | None:
    """The same, layer by layer, in the last logged interval."""
    from matplotlib.ticker import MaxNLocator

    row = next((row for row in reversed(run.rows) if f"{EXPERT_LAYER}0/busiest" in row), None)
    if row is None:
        return None
    figure, (axes,) = new_figure("Expert load by layer", f"share of a layer's tokens, at step {row['step']:,}")
    for side, colour in _LOADS:
        shares: list[float] = []
        while (share := row.get(f"{EXPERT_LAYER}{len(shares)}/{side}")) is not None:
            shares.append(100 * share)
        axes.plot(range(len(shares)), shares, marker="o", markersize=4.5, color=colour, linewidth=1.4, label=side)
    axes.set_xlabel("layer with experts")
    axes.set_ylabel("% of tokens")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    legend(axes)
    return figure


def lengths(run: RunRecords) -> Figure | None:
    """Token counts of prompts and responses; each panel is a histogram, with its median marked."""
    parts = [
        (name, values, colour)
        for name, colour in (("prompt", MUTED), ("chosen", CHOSEN), ("rejected", REJECTED))
        if len(values := token_counts(run, name))
    ]
    if not parts:
        return None
    stride = run.data.get("rows_per_length", 1)
    rows = "all kept rows" if stride == 1 else f"one of every {stride:,} kept rows"
    figure, axes = new_figure("Lengths", f"tokens, {rows}", rows=len(parts))
    # The longest percent of rows would squeeze the rest into a corner: it goes into the last bin.
    top = max(float(np.quantile(values, 0.99)) for _, values, _ in parts)
    width = max(1, math.ceil((top + 1) / 60))
    edges = np.arange(0, math.floor(top) + 1 + width, width)
    for panel, (name, values, colour) in zip(axes, parts, strict=True):
        inside = np.minimum(values, edges[-1] - 1)
        panel.hist(inside, bins=edges.tolist(), color=colour, edgecolor="white", linewidth=0.4)
        # Room for the words above the bars.
        panel.set_ylim(top=1.25 * panel.get_ylim()[1])
        median = float(np.median(values))
        panel.axvline(median, color=INK, linewidth=1.4, linestyle=(0, (4, 3)))
        panel.set_ylabel("rows")
        panel.set_xlim(edges[0], edges[-1])
        panel.text(
            0.995,
            0.93,
            f"{name}:  median {median:,.0f},  longest {values.max():,.0f}",
            transform=panel.transAxes,
            ha="right",
            va="top",
            fontsize=10,
            color=colour,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 2},
        )
    axes[-1].set_xlabel("tokens (the last bin holds everything longer)" if _beyond(parts, edges[-1] - 1) else "tokens")
    return figure


PICTURES = (
    Picture("loss", "Training and held-out loss.", loss),
    Picture(
        "margins",
        "How much further apart chosen and rejected are than in the reference.",
        margins,
        "How far apart chosen and rejected are under the policy; this loss has no reference.",
        "How much further apart desirable and undesirable rows are than in the reference.",
    ),
    Picture(
        "accuracies",
        "How often the chosen response has the higher reward. Ties count as wrong: before training, all pairs.",
        accuracies,
        of_rows=f"How often the reward of a row {_RIGHT}.",
    ),
    Picture(
        "rewards",
        "Where the margin comes from: chosen going up, or rejected going down.",
        rewards,
        of_rows="Where the margin comes from: desirable rows (chosen) going up, or the others (rejected) going down.",
    ),
    Picture("divergence", "How far the policy is from the reference, which rewards are measured from.", divergence),
    Picture("logps", "Log-probabilities of whole responses under the policy.", logps),
    Picture("sets", "Which sets of the mixture are learned, and how far.", sets),
    Picture("optimizer", "Learning rate schedule and gradient norm.", optimizer),
    Picture("experts", "How evenly the experts of a mixture are used.", experts),
    Picture("expert_layers", "Which layers of a mixture use their experts unevenly.", expert_layers),
    Picture("throughput", "Speed, packing, memory. MFU: share of this machine's rate of matrix products.", throughput),
    Picture("lengths", "Tokens per prompt and response in the training data.", lengths),
)


def token_counts(run: RunRecords, name: str) -> np.ndarray:
    """Token counts of one part of every row, float64 [rows]; empty when the run did not record them."""
    recorded: Any = run.data.get("lengths", {})
    values = recorded.get(name, ()) if isinstance(recorded, dict) else ()
    return np.asarray([v for v in values if isinstance(v, (int, float))], dtype=np.float64)


def _has(run: RunRecords, name: str) -> bool:
    found = [run.series(key) for key in _names(run, name)]
    return any(series is not None and len(series.finite) for series in found)


def _names(run: RunRecords, name: str) -> list[str]:
    """A metric of training, and what it is called in each evaluation set."""
    return [name, *(prefix + name for prefix in run.eval_sets)]


def _train_and_evaluation(axes: Axes, run: RunRecords, name: str) -> None:
    train = run.series(name)
    if train is not None:
        draw_series(axes, train, "training", TRAIN)
    for (prefix, label), colour in zip(run.eval_sets.items(), cycle(EVALS), strict=False):
        if (held_out := run.series(prefix + name)) is not None:
            draw_evaluation(axes, held_out, label, colour)


def _chosen_and_rejected(run: RunRecords, family: str, *, title: str, subtitle: str, label: str) -> Figure | None:
    sides = [(side, colour) for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED))]
    if not any(_has(run, f"{family}/{side}") for side, _ in sides):
        return None
    figure, (axes,) = new_figure(title, subtitle)
    for side, colour in sides:
        train = run.series(f"{family}/{side}")
        if train is not None:
            draw_series(axes, train, side, colour)
        for prefix, name in run.eval_sets.items():
            if (held_out := run.series(f"{prefix}{family}/{side}")) is not None:
                draw_evaluation(axes, held_out, f"{side}, {name}", colour)
    _label(axes, run, label)
    return figure


def _label(axes: Axes, run: RunRecords, label: str, *, last: bool = True) -> None:
    finish_steps(axes, run.first_step, run.last_step)
    axes.set_ylabel(label)
    if last:
        axes.set_xlabel("optimizer step")
    legend(axes)


def _spread(values: np.ndarray) -> float:
    positive = values[values > 0]
    return float(positive.max() / np.median(positive)) if len(positive) else 1.0


def _beyond(parts: Sequence[tuple[str, np.ndarray, str]], edge: float) -> bool:
    return any(values.max() > edge for _, values, _ in parts)
