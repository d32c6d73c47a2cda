"""Bar charts of benchmark tables: time as a multiple of the bare products, extra memory beside it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.report.style import DPI, GRID, INK, MUTED, TRAIN

OTHERS = "#b4bec8"
BAR_INCHES = 0.31
"""Height of a bar with its gap."""


def draw_table(rows: Sequence[dict[str, Any]], path: Path, *, title: str, subtitle: str) -> None:
    """One panel pair per task: time over the task's floor, and extra memory. Contenders that did not run are named."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    raced = {task: _raced(rows, task) for task in tasks}
    sizes = [len(raced[task]) + 2.4 for task in tasks]
    absent = _absent(rows)
    heading, footing = 0.78, 0.18 + 0.2 * len(absent)
    height = heading + footing + BAR_INCHES * sum(sizes)
    bottom = footing / height
    layout = ConstrainedLayoutEngine(rect=(0, bottom, 1, 1 - bottom - heading / height), h_pad=0.06, w_pad=0.08)
    with rc_context({"font.size": 10.0, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED}):
        figure = Figure(figsize=(9.6, height), dpi=DPI, layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        shape = {"height_ratios": sizes, "width_ratios": (1.75, 1)}
        panels = figure.subplots(len(tasks), 2, squeeze=False, gridspec_kw=shape, sharex="col")
        for task, (times, memory) in zip(tasks, panels, strict=True):
            _draw_times(times, raced[task], task)
            _draw_memory(memory, raced[task])
        panels[-1][0].set_xlabel("time over three bare products; white mark: the row's own number of them")
        panels[-1][1].set_xlabel("peak extra memory, MiB")
        figure.text(0.012, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
        figure.text(0.0125, 1 - 0.43 / height, textwrap.fill(subtitle, 118), fontsize=9.5, va="top", color=MUTED)
        for line, text in enumerate(absent):
            figure.text(0.0125, (footing - 0.12 - 0.2 * line) / height, text, fontsize=8.5, va="top", color=MUTED)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _raced(rows: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Contenders with a time, the fastest first."""
    found = [row for row in rows if row["task"] == task and "ms" in row and not row["contender"].startswith("bare")]
    return sorted(found, key=lambda row: row["ms"])


def _absent(rows: Sequence[dict[str, Any]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "ms" not in row:
            reasons.setdefault(row["note"], []).append(row["contender"])
    return [f"{', '.join(dict.fromkeys(names))}: {_shortened(reason)}" for reason, names in reasons.items()]


def _shortened(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _draw_times(axes: Any, rows: Sequence[dict[str, Any]], task: str) -> None:
    places = range(len(rows))
    ratios = [row["x 3G floor"] for row in rows]
    axes.barh(places, ratios, height=0.66, color=[_colour(row) for row in rows], zorder=2)
    floors = {row["G"]: row["x 3G floor"] / row["x own floor"] for row in rows}
    for place, row in zip(places, rows, strict=True):
        # The floor of the row's own number of products, as a notch in its bar.
        axes.plot([floors[row["G"]]] * 2, [place - 0.33, place + 0.33], color="white", linewidth=1.6, zorder=3)
        label = f" {row['x own floor']:.2f}x of {row['G']}G   {_duration(row['ms'])}"
        axes.text(row["x 3G floor"], place, label, va="center", fontsize=9, color=INK if row.get("ours") else MUTED)
    axes.set_yticks(places, [row["contender"] for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.get("ours") else "normal")
        tick.set_color(INK)
    axes.set_xlim(0, max(axes.get_xlim()[1], max(ratios) * 1.5))
    axes.set_title(task, loc="left", fontsize=11, fontweight="bold")
    _tidy(axes)


def _draw_memory(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = range(len(rows))
    sizes = [max(row["extra MiB"], 0.1) for row in rows]
    axes.barh(places, sizes, height=0.66, color=[_colour(row) for row in rows], zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(min(1.0, *sizes, axes.get_xlim()[0]), max(axes.get_xlim()[1], max(sizes) * 6))
    for place, row in zip(places, rows, strict=True):
        text = f" {row['extra MiB']:,.0f}" if row["extra MiB"] >= 0.5 else " < 1"
        axes.text(sizes[place], place, text, va="center", fontsize=9, color=MUTED)
    axes.set_yticks([])
    axes.tick_params(axis="x", which="minor", length=0)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(axis="both", length=0, labelsize=9.5)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def _colour(row: dict[str, Any]) -> str:
    return TRAIN if row.get("ours") else OTHERS


def _duration(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"
