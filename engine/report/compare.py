"""Several runs on one page: curves over each other, what differs in their configurations, reward against divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..run_folder import SAMPLED, tokens_of
from .page import SavedPicture, environment, worst_rows
from .style import Strand, draw_evaluation, draw_series, finish_steps, legend, new_figure
from .tables import flat_config, metric_rows, shown_setting
from .words import glossary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .records import RunRecords

TEMPLATE = "compare.html.jinja"
CURVES = (
    ("loss", "Training loss", "nats per {unit}; of different losses, not to be compared"),
    ("rewards/margins", "Reward margin in training", "mean chosen reward minus mean rejected reward, over {units}"),
    ("rewards/accuracies", "Reward accuracy in training", "share of {units} whose rewards are on the right side"),
    ("kl", "Divergence from the reference in training", "estimated by KTO, nats"),
    ("eval_loss", "Held-out loss", "nats per {unit}; of different losses, not to be compared"),
    ("eval_rewards/accuracies", "Held-out reward accuracy", "share of {units}"),
    ("eval_kl", "Held-out divergence from the reference", "estimated by KTO, nats"),
    ("eval_ranking_accuracy", "Held-out ranking accuracy", "share of pairs whose chosen response is the likelier one"),
)
"""Metric, title and subtitle of each picture."""
_WORST_SHOWN = 3
_DIVERGENCE = "Reward against divergence"
_FALL = "Reward against fall of chosen"
WHERE = ("train.output_dir", "train.run_name")
"""Keys that differ between any two runs."""


def names_of(runs: Sequence[RunRecords]) -> list[str]:
    """What to call each run: the last parts of its path, as many as tell them apart; of a sweep what it varies."""
    parts = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return _varied(names)
    return [f"{name} ({place})" for place, name in enumerate(names, start=1)]


def _varied(names: Sequence[str]) -> list[str]:
    """Names such as ``beta=0.1,loss_type=ipo`` without the settings that all have, and with room to break lines."""
    settings = [name.split(",") for name in names]
    if len(names) < 2 or not all("=" in setting for name in settings for setting in name):
        return list(names)
    shared = set(settings[0]).intersection(*settings)
    varied = [", ".join(setting for setting in name if setting not in shared) for name in settings]
    return varied if all(varied) else list(names)


def pictures(runs: Sequence[RunRecords], names: Sequence[str]) -> list[tuple[str, Figure]]:
    """Captions and figures; of what no run has logged there is none."""
    found = []
    units = sorted({run.unit for run in runs})
    words = {"unit": " or ".join(unit[:-1] for unit in units), "units": " or ".join(units)}
    for metric, title, form in CURVES:
        subtitle = form.format(**words)
        for own, named in _of_sets(runs, metric, title):
            if (figure := _overlay(runs, names, own, named, subtitle)) is not None:
                found.append((f"{named}: {subtitle}.", figure))
    return [*found, *_frontiers(runs, names)]


def _of_sets(runs: Sequence[RunRecords], metric: str, title: str) -> list[tuple[str, str]]:
    """The metric and its title, for each evaluation set that a run has; those of training as they are."""
    bare = metric.removeprefix("eval_")
    if bare == metric:
        return [(metric, title)]
    sets = {prefix: name for run in runs for prefix, name in run.eval_sets.items()}
    return [(f"{prefix}{bare}", title if prefix == "eval_" else f"{title}, {name}") for prefix, name in sets.items()]


def render(runs: Sequence[RunRecords], names: Sequence[str], pictures: Sequence[SavedPicture]) -> str:
    """The whole page as HTML."""
    heads = [
        {"name": name, "state": "finished" if run.finished else "in progress or stopped", "step": f"{run.last_step:,}"}
        for run, name in zip(runs, names, strict=True)
    ]
    unit = " or ".join(sorted({run.unit for run in runs}))
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            runs=heads,
            names=names,
            glossary=glossary(unit, has_reference=any(run.has_reference for run in runs)),
            metrics=metric_rows([_last_evaluation(run) for run in runs], unit),
            differences=_differences(runs),
            pictures=pictures,
            samples=_samples(runs, names),
            worst=_worst(runs, names),
        )
    )


def _colours(count: int) -> list[str]:
    import matplotlib

    palette = cycle(matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors)  # type: ignore[attr-defined]
    return [matplotlib.colors.to_hex(next(palette)) for _ in range(count)]


def _overlay(runs: Sequence[RunRecords], names: Sequence[str], metric: str, title: str, subtitle: str) -> Figure | None:
    drawn = [
        (name, series, colour)
        for run, name, colour in zip(runs, names, _colours(len(runs)), strict=True)
        if (series := run.series(metric)) is not None and len(series.finite)
    ]
    if not drawn:
        return None
    figure, (axes,) = new_figure(title, subtitle, labels=[name for name, _, _ in drawn])
    draw = draw_evaluation if metric.startswith("eval_") else draw_series
    for place, (name, series, colour) in enumerate(drawn):
        draw(axes, series, name, colour, Strand(place, len(drawn)))
    finish_steps(axes, min(run.first_step for run in runs), max(run.last_step for run in runs))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(metric)
    legend(axes)
    return figure


def _frontiers(runs: Sequence[RunRecords], names: Sequence[str]) -> list[tuple[str, Figure]]:
    """Held-out accuracy against the distance from the reference: one point for each evaluation that has both.

    The distance is the KL divergence where every run was evaluated with samples, and else how far the log-probs of
    held-out chosen responses fell.
    """
    sets = _of_sets(runs, "eval_rewards/accuracies", _DIVERGENCE)
    return [found for accuracy, title in sets if (found := _frontier(runs, names, accuracy, title)) is not None]


def _frontier(runs: Sequence[RunRecords], names: Sequence[str], accuracy: str, title: str) -> tuple[str, Figure] | None:
    prefix = accuracy.removesuffix("rewards/accuracies")
    sampled = f"{prefix}{SAMPLED}kl"
    samples = all(sampled in run.evaluation for run in runs)
    metric = sampled if samples else f"{prefix}logps_change/chosen"
    points = [
        [
            (row[metric] if samples else -row[metric], row[accuracy])
            for row in ([run.evaluation] if samples else run.rows)
            if _is_finite(row.get(metric)) and _is_finite(row.get(accuracy))
        ]
        for run in runs
    ]
    if not any(points):
        return None
    if not samples:
        title = title.replace(_DIVERGENCE, _FALL, 1)
    words = "KL(policy || reference), nats" if samples else "fall of the log-prob of chosen responses, nats"
    units = " or ".join(sorted({run.unit for run in runs}))
    figure, (axes,) = new_figure(title, f"held-out {units}; points are evaluations", labels=names)
    drawn = [each for each in zip(points, names, _colours(len(runs)), strict=True) if each[0]]
    for place, (of_run, name, colour) in enumerate(drawn):
        strand = Strand(place, len(drawn))
        look = {"color": colour, "linestyle": strand.dashes, **strand.markers(len(of_run), 6.0)}
        axes.plot(*zip(*of_run, strict=True), marker="o", linewidth=1.0, label=name, **look)
    axes.set_xlabel(words)
    axes.set_ylabel("held-out reward accuracy")
    axes.margins(0.1)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.03))
    legend(axes)
    return f"{title}: held-out reward accuracy over {words}.", figure


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _last_evaluation(run: RunRecords) -> dict[str, Any]:
    """That of the model which was written, or of the last row of one."""
    rows = [row for row in run.rows if any(name.startswith("eval_") for name in row)]
    found = run.evaluation or (rows[-1] if rows else {})
    return {name: value for name, value in found.items() if name.startswith("eval_") and tokens_of(name) is None}


def _differences(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    configs = [flat_config(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config if name not in WHERE)
    table = []
    for name in names:
        values = [shown_setting(config[name]) if name in config else "" for config in configs]
        if len(set(values)) > 1:
            table.append({"name": name, "values": values})
    return table


def _samples(runs: Sequence[RunRecords], names: Sequence[str]) -> list[dict[str, Any]]:
    """The most likely answer of each run at its last step, by prompt."""
    prompts: dict[str, dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        for sample in _last(run.samples):
            found = prompts.setdefault(
                sample["prompt"], {"row": sample["row"], "prompt": sample["prompt"], "answers": []}
            )
            found["answers"].append({"run": name, "text": sample["greedy"]})
    return list(prompts.values())


def _last(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if sample["step"] == samples[-1]["step"]]


def _worst(runs: Sequence[RunRecords], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that lost the most in each run, of all its evaluation sets together."""
    found = []
    for run, name in zip(runs, names, strict=True):
        rows = [row for details in run.details.values() for row in worst_rows(details)]
        if rows:
            found.append({"name": name, "rows": sorted(rows, key=lambda row: row["chosen"])[:_WORST_SHOWN]})
    return found
