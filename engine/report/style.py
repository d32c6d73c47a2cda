"""The look of every figure: one palette, one grid, one way to draw a metric over steps.

matplotlib is imported inside functions, so that importing the engine stays fast. Figures are built without pyplot: no
global state, no display.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .records import Series

INK = "#22303c"
MUTED = "#5a6773"
GRID = "#e6e9ec"
TRAIN = "#2f5d8a"
EVAL = "#d1782c"
EVALS = (EVAL, "#7a5195", "#4c9f70", "#b5a132")
"""Of evaluation sets, in turn."""
CHOSEN = "#1d7874"
REJECTED = "#b8475a"
DPI = 180
_WIDTH = 5.2
"""Inches, which a desktop shows as about 560 pixels and a phone as 360: text of 10 points can be read on both."""
_SUBTITLE_CHARACTERS = 66
_LEGEND_CHARACTERS = 62
"""Of the labels in one line above a panel."""
_LEGEND_LINE = 0.2
"""Inches."""
_GAP = 0.5
"""Share of its period that the last of several curves leaves free."""
_SEEN = 2.5
"""Widths of a line that each of them is seen for in a period, where all lie on each other."""
_RING, _RINGS = 2.0, 10.0
"""Points by which markers of one place differ, and those of the first and the last at most."""
_FEW = 15
SMOOTH_FROM = 40
"""Series with at least this many points are drawn raw and smoothed."""

_RC: dict[Any, Any] = {
    "font.size": 11.0,
    "axes.labelsize": 11.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b7bfc7",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
    "text.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def new_figure(
    title: str, subtitle: str, *, rows: int = 1, columns: int = 1, labels: Sequence[str] = ()
) -> tuple[Figure, list[Axes]]:
    """A figure with a left-aligned heading above ``rows`` x ``columns`` panels.

    Args:
        labels: of the legend, where it may take more than a line.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = textwrap.wrap(subtitle, _SUBTITLE_CHARACTERS)
    head = 0.46 + 0.16 * len(lines)
    height = (3.0 if rows == 1 else 0.5 + 1.6 * rows) + head + _LEGEND_LINE * (_legend_lines(labels) - 1)
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), h_pad=0.06, w_pad=0.06)
    with rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, height), dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=columns == 1)
    figure.text(0.014, 1 - 0.16 / height, title, fontsize=14, fontweight="bold", va="top", color=INK)
    figure.text(0.0145, 1 - 0.42 / height, "\n".join(lines), fontsize=10, va="top", color=MUTED, linespacing=1.15)
    return figure, list(panels.flat)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over ``window`` points; it narrows at the ends and skips nan."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


class Strand(NamedTuple):
    """A curve among several that may lie on each other: drawn in their order, each leaves a part of those below it in
    sight, by longer gaps and smaller markers."""

    place: int = 0
    curves: int = 1

    @property
    def below(self) -> float:
        """From 0 for the first to 1 for the last."""
        return self.place / max(self.curves - 1, 1)

    @property
    def dashes(self) -> tuple[float, tuple[float, ...]] | str:
        """A line style of matplotlib, in widths of the line: each covers less of the same period."""
        if self.place == 0:
            return "solid"
        period = max(8.0, _SEEN * (self.curves - 1) / _GAP)
        return (0.0, (period * (1 - _GAP * self.below), period * _GAP * self.below))

    def markers(self, values: int, size: float) -> dict[str, Any]:
        """Size, in points, and places of the markers of a curve, for matplotlib: on each of a few values, inside those
        below; of more values each curve has its own."""
        if values > _FEW:
            return {"markersize": size, "markevery": (self.place, self.curves)}
        return {"markersize": size + min(_RING * (self.curves - 1), _RINGS) * (1 - self.below)}


ALONE = Strand()


def draw_series(axes: Axes, series: Series, label: str, colour: str, strand: Strand = ALONE) -> None:
    """Draw every logged value; with many points, faintly, under a moving average."""
    look: dict[str, Any] = {"color": colour, "linestyle": strand.dashes}
    if len(series) >= SMOOTH_FROM:
        window = max(5, len(series) // 20) | 1
        axes.plot(series.steps, series.values, color=colour, alpha=0.28, linewidth=0.9, label=f"_{label} (raw)")
        axes.plot(series.steps, smooth(series.values, window), linewidth=2.0, label=label, **look)
        return
    look |= strand.markers(len(series), 7.0 if len(series) == 1 else 4.5 if len(series) <= _FEW else 3.0)
    axes.plot(series.steps, series.values, marker="o", linewidth=1.8, label=label, **look)


def draw_evaluation(axes: Axes, series: Series, label: str, colour: str, strand: Strand = ALONE) -> None:
    """Draw held-out values: few, so each gets a marker."""
    axes.plot(
        series.steps,
        series.values,
        linestyle=(0, (3, 1.5)) if strand.curves == 1 else strand.dashes,
        marker="D",
        **strand.markers(len(series), 5.5),
        markerfacecolor="white",
        markeredgewidth=1.6 if strand.curves == 1 else 1.0,
        color=colour,
        linewidth=1.4,
        label=label,
    )


def reference_line(axes: Axes, value: float, label: str) -> None:
    """A thin dashed line across the panel, named where the least data is in the way. Call it when all else is drawn."""
    data = _data_points(axes)
    axes.axhline(value, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1, label=f"_{label}")
    height = axes.transAxes.inverted().transform(axes.transData.transform((axes.get_xlim()[1], value)))[1]
    crowded = {
        (side, above): _points_behind(axes, data, len(label), height, side, above)
        for above in (True, False)
        for side in ("right", "left")
    }
    side, above = min(crowded, key=lambda place: crowded[place])
    axes.annotate(
        label,
        xy=(1.0 if side == "right" else 0.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(-2 if side == "right" else 4, 3 if above else -3),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        fontsize=9.5,
        color=MUTED,
    )


def _data_points(axes: Axes) -> list[np.ndarray]:
    """The drawn curves as points close together, each float64 [n, 2] in data coordinates."""
    curves = []
    for line in axes.get_lines():
        xy = np.column_stack([line.get_xdata(), line.get_ydata()]).astype(np.float64)
        at = np.linspace(0, len(xy) - 1, 400)
        curves.append(np.column_stack([np.interp(at, np.arange(len(xy)), column) for column in xy.T]))
    return curves


def _points_behind(axes: Axes, data: list[np.ndarray], characters: int, height: float, side: str, above: bool) -> int:
    """How many points of the curves a label beside a line at ``height`` (a fraction of the panel) would cover."""
    box = axes.get_window_extent()
    # In fractions of the panel: a character of 9.5 points is about 5.6 points wide, a line of text 14 high.
    wide, high = (points * DPI / 72 / pixels for points, pixels in ((5.6 * characters, box.width), (16, box.height)))
    low, top = (height, height + high) if above else (height - high, height)
    if low < 0 or top > 1:
        return sum(len(points) for points in data) + 1
    covered = 0
    for points in data:
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(points)).T
        beside = x > 1 - wide if side == "right" else x < wide
        covered += int((beside & (y > low) & (y < top)).sum())
    return covered


def finish_steps(axes: Axes, first_step: float, last_step: float) -> None:
    """Whole-number steps along x, from the start of the run to its last row."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if first_step == last_step:
        axes.set_xlim(last_step - 1, last_step + 1)
    else:
        axes.set_xlim(0, last_step * 1.02)
    axes.margins(y=0.12)


def _legend_columns(labels: Sequence[str]) -> int:
    # A handle takes as much as five letters.
    return max(1, min(4, len(labels), _LEGEND_CHARACTERS // (5 + max(map(len, labels)))))


def _legend_lines(labels: Sequence[str]) -> int:
    return math.ceil(len(labels) / _legend_columns(labels)) if labels else 1


def legend(axes: Axes) -> None:
    """A legend above the panel, out of the way of the data, when there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(
            handles,
            labels,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=_legend_columns(labels),
            borderaxespad=0.2,
            columnspacing=1.4,
            handlelength=1.6,
            frameon=False,
            fontsize=10,
            labelcolor=INK,
        )
