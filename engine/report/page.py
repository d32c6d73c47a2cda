"""The HTML page of a run: headline numbers, pictures, evaluation, data problems and configuration.

Everything here turns records into strings; the template escapes all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import RunConfig
from ..digits import ERROR, shown, shown_number, with_error
from ..run_folder import (
    BY_LENGTH,
    EVAL_SOURCE,
    PAIRS_BY_LENGTH,
    TRAIN_SOURCE,
    bin_words,
    eval_prefixes,
    of_sources,
    tokens_of,
)
from .figures import token_counts
from .records import RunRecords
from .tables import flat_config, metric_rows, shown_setting
from .words import glossary, training_terms

TEMPLATE = "page.html.jinja"
SET_METRICS = ("num_pairs", "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
"""Columns of the tables of a mixture's sets."""
_LENGTH_HEADS = (BY_LENGTH, PAIRS_BY_LENGTH)
_STEPS_SHOWN = 3
_SHARES = ("confidence", "accuracy", "predicted", "observed")
_ANSWER_TABLES = (
    (
        "nats by which the reference prefers the chosen response",
        "by_reference_margin",
        ("pairs", "ranked_right", "flipped"),
        "Of the pairs that the reference ranks so clearly, how many the policy ranks right, and how many it ranks "
        "other than the reference. Pairs that the reference ranks far wrong are the hard ones.",
    ),
    (
        "how sure the reward is",
        "calibration",
        ("pairs", "confidence", "accuracy"),
        "A reward whose accuracy is below its confidence is too sure, one above it not sure enough.",
    ),
    (
        "probability that the reward gives the side it prefers",
        "preference_shares",
        ("pairs", "votes", "predicted", "observed"),
        "Pairs that were judged more than once: the share of votes for that side should be what was predicted.",
    ),
)


@dataclass(frozen=True)
class SavedPicture:
    """A PNG inside the page."""

    data: str
    """In base64."""
    caption: str
    width: int
    """Pixels."""
    height: int


def render(run: RunRecords, pictures: Sequence[SavedPicture]) -> str:
    """The whole page as HTML."""
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=run.folder.resolve().name,
            unit=run.unit,
            state="finished" if run.finished else "in progress or stopped",
            subtitle=_subtitle(run),
            cards=_cards(run),
            pictures=pictures,
            glossary=[*glossary(run.unit, has_reference=run.has_reference), *training_terms(run.unit)],
            evaluation=_evaluation(run),
            by_length=_by_length(run.evaluation),
            by_source=_by_source(run),
            answers=_answers(run.details),
            samples=_samples(run.samples),
            lint=_lint(run.data.get("lint")),
            config=_config(run.config),
            set_metrics=[_bare(name) for name in SET_METRICS],
        )
    )


def environment() -> Any:
    """Of the templates beside this file; what they are given is escaped."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    found = Environment(loader=loader, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    found.filters["breaks"] = _with_breaks
    return found


def _with_breaks(name: str) -> Any:
    """HTML in which a long name may go on in the next line behind each of its parts."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_/,])(?=\w)", r"\1<wbr>", str(escape(name))))


def _subtitle(run: RunRecords) -> str:
    model = run.config.get("model", {}).get("model_name_or_path")
    data = run.config.get("data", {})
    sets = data.get("datasets") or ()
    name = data.get("dataset_name")
    dataset = f"{len(sets)} sets" if sets else ", ".join(name) if isinstance(name, list) else name
    parts = [f"{name} {value}" for name, value in (("model", model), ("data", dataset)) if value]
    total = _plan(run).get("total_steps")
    of_total = f" of {total:,}" if isinstance(total, int) else ""
    steps = f"step {run.last_step:,}{of_total}"
    if (seconds := run.seconds) is not None:
        whole = round(seconds)
        steps += f" in {whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return ", ".join([*parts, *_settings(run), steps])


def _settings(run: RunRecords) -> list[str]:
    """Loss, beta and learning rate, where the configuration is there."""
    loss, optim = run.config.get("loss", {}), run.config.get("optim", {})
    found = [f"loss {' + '.join(run.loss_types)}"] if loss else []
    found += [f"beta {loss['beta']:g}"] if isinstance(loss.get("beta"), int | float) else []
    rate = optim.get("learning_rate")
    return found + ([f"learning rate {rate:g}"] if isinstance(rate, int | float) else [])


def _plan(run: RunRecords) -> Mapping[str, Any]:
    plan = run.data.get("plan")
    return plan if isinstance(plan, dict) else {}


def _cards(run: RunRecords) -> list[dict[str, str]]:
    """Headline numbers; a number the run did not log has no card."""
    cards: list[dict[str, str]] = []

    def add(value: float | None, label: str, shape: str) -> None:
        if value is not None and math.isfinite(value):
            cards.append({"value": shape.format(value), "label": label})

    def last(name: str) -> float | None:
        series = run.series(name)
        return None if series is None else series.last

    def add_figure(name: str, label: str, *, percent: bool = False) -> None:
        value, error = last(name), last(name + ERROR)
        if value is None or not math.isfinite(value):
            return
        scale, sign = (100, "%") if percent else (1, "")
        words = f"{value:.1%}" if percent else shown_number(value)
        if error:
            words = with_error(name, scale * value, scale * error) + sign
        cards.append({"value": words, "label": label})

    for prefix, name in run.eval_sets.items():
        add_figure(f"{prefix}rewards/accuracies", f"{name} reward accuracy", percent=True)
        add_figure(f"{prefix}loss", f"{name} loss (nats)")
    add_figure("rewards/accuracies", "training reward accuracy", percent=True)
    add_figure("loss", "training loss (nats)")
    add_figure("rewards/margins", "training reward margin")
    for name, label in (("perf/pairs_per_second", f"{run.unit} / s"), ("perf/tokens_per_second", "tokens / s")):
        series = run.series(name)
        if series is not None and len(series.finite):
            median = float(np.median(series.finite))
            add(median, f"{label}, median", "{:,.1f}" if median < 100 else "{:,.0f}")
    add(last("num_tokens"), "tokens trained on, the prompt counted with each response", "{:,.0f}")
    shared = run.series("perf/shared_fraction")
    if shared is not None and len(shared.finite):
        add(float(shared.finite.mean()), "tokens saved by prompt sharing", "{:.1%}")
    add(last("epoch"), "epochs", "{:.2f}")
    add(
        _plan(run).get("groups") or len(token_counts(run, "prompt")) or None,
        "preference groups: prompts with the responses that are compared" if run.unit == "pairs" else "rows",
        "{:,}",
    )
    return cards


def _evaluation(run: RunRecords) -> dict[str, Any]:
    """Metrics by name: at the first and last evaluation while training, and of the model that was written."""
    found = [row for row in run.rows if any(key.startswith("eval_") for key in row)]
    columns: dict[str, Mapping[str, Any]] = {}
    if found:
        columns[f"step {found[0]['step']:,}"] = found[0]
        columns[f"step {found[-1]['step']:,}"] = found[-1]
    if run.evaluation:
        whole = {name: value for name, value in run.evaluation.items() if tokens_of(name) is None}
        if found and _same(found[-1], whole):
            columns.popitem()
        columns["final model"] = {f"eval_{_bare(name)}": value for name, value in whole.items()}
    return {"columns": list(columns), "rows": metric_rows(list(columns.values()), run.unit)}


def _same(row: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether an evaluation while training has nothing that ``evaluation`` has not."""
    # Null in the one is not a number in the other.
    return all(
        evaluation.get(name) in (value, None if math.isnan(value) else value)
        for name, value in row.items()
        if name.startswith("eval_")
    )


def _bare(name: str) -> str:
    return name.removeprefix("eval_")


def _by_source(run: RunRecords) -> dict[str, list[dict[str, Any]]]:
    """Tables of the sets of a mixture: of the last logged interval, and of the last evaluation."""
    tables = {}
    for title, prefix in (("in training, last interval", TRAIN_SOURCE), ("held-out", EVAL_SOURCE)):
        row: Mapping[str, Any] = next((row for row in reversed(run.rows) if of_sources(prefix, row)), {})
        if sets := of_sources(prefix, row):
            tables[title] = [
                {"name": label, "values": [shown(name, metrics.get(name)) for name in SET_METRICS]}
                for label, metrics in sets.items()
            ]
    return tables


def _by_length(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows by length, of each evaluation set."""
    rows = []
    for prefix in eval_prefixes(evaluation) or ["eval_"]:
        own = {f"eval_{k.removeprefix(prefix)}": v for k, v in evaluation.items() if k.startswith(prefix)}
        name = prefix.removeprefix("eval_").removesuffix("_")
        found = dict.fromkeys(
            tokens for metric in own if metric.startswith(_LENGTH_HEADS) and (tokens := tokens_of(metric))
        )
        rows += [
            {
                "tokens": f"{name} {tokens}".strip(),
                "accuracy": shown_number(own.get(BY_LENGTH + tokens)),
                "pairs": shown("num_pairs", own.get(PAIRS_BY_LENGTH + tokens)),
            }
            for tokens in found
        ]
    return rows


def _answers(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of what ``dpo evaluate`` found beside its numbers, of each evaluation set."""
    sets = []
    for split, found in details.items():
        tables = {}
        for title, key, columns, words in _ANSWER_TABLES:
            rows = [[bin_words(r), *(_of_bin(c, r.get(c)) for c in columns)] for r in found.get(key, ())]
            if rows:
                tables[title] = {"columns": [c.replace("_", " ") for c in columns], "rows": rows, "words": words}
        name = split.removeprefix("eval").removeprefix("_")
        sets.append({"name": name, "tables": tables, "worst": worst_rows(found)})
    return [found for found in sets if found["tables"] or found["worst"]]


def worst_rows(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that lost the most of one evaluation set, with their change in words."""
    # No number is what JSON has for minus infinity.
    rows = [{**row, "chosen": float("-inf") if row["chosen"] is None else row["chosen"]} for row in _displaced(details)]
    return [{**row, "change": shown_number(row["chosen"])} for row in rows]


def _displaced(details: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return details.get("most_displaced", ())


def _of_bin(column: str, value: Any) -> str:
    return shown_number(value) if column in _SHARES else shown("num_pairs", value)


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt with its answers by step: of many steps the first, one in the middle and the last."""
    steps = list(dict.fromkeys(sample["step"] for sample in samples))
    shown = steps if len(steps) <= _STEPS_SHOWN else [steps[0], steps[len(steps) // 2], steps[-1]]
    prompts: dict[str, dict[str, Any]] = {}
    for sample in samples:
        # Sets of a mixture number their rows alike.
        found = prompts.setdefault(sample["prompt"], {"row": sample["row"], "prompt": sample["prompt"], "answers": []})
        if sample["step"] in shown:
            found["answers"].append(sample)
    return list(prompts.values())


def _lint(lint: Any) -> list[dict[str, str]]:
    """Rows of the data table. ``lint`` is the report of the training data, which holds that of the evaluation data,
    or one for each split."""
    if not isinstance(lint, dict):
        return []
    if "total" not in lint:
        reports = [(str(split), report) for split, report in lint.items() if isinstance(report, dict)]
    else:
        held_out = [
            (name, found) for name, found in lint.items() if name.startswith("eval") and isinstance(found, dict)
        ]
        reports = [("train" if held_out else "", lint), *held_out]
    table: list[dict[str, str]] = []
    for split, report in [part for pair in reports for part in _each_set(*pair)]:
        head = ": ".join(part for part in (split, str(report.get("source", ""))) if part) or "rows"
        for name in ("total", "kept", "dropped"):
            if name in report:
                table.append({"name": f"{head} - {name}", "count": shown_number(report[name]), "rows": ""})
        rows = report.get("rows", {})
        for name, count in report.get("counts", {}).items():
            table.append(
                {"name": _problem(name), "count": shown_number(count), "rows": _some(rows.get(name, ()), count)}
            )
    return table


def _each_set(split: str, report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The reports of the sets of a mixture behind that of all; a report of one set alone."""
    return [(split, report), *((split, part) for part in report.get("sources", {}).values())]


def _problem(name: str) -> str:
    from ..data.problems import PROBLEMS

    problem = PROBLEMS.get(name)
    if problem is None:
        return name
    # A run that is reported did not stop at it.
    return f"{name}: {problem.meaning} ({'kept' if problem.stops else problem.effect})"


def _some(rows: Sequence[int], count: int, shown: int = 10) -> str:
    more = ", ..." if count > min(len(rows), shown) else ""
    return ", ".join(str(row) for row in rows[:shown]) + more


def _config(config: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every key of the resolved configuration, and whether it differs from the default."""
    defaults = _defaults()
    table = []
    for name, value in flat_config(config).items():
        default = defaults.get(name)
        changed = name not in defaults or _plain(value) != _plain(default)
        row = {"name": name, "value": shown_setting(value), "changed": changed}
        table.append(row | {"default": shown_setting(default) if name in defaults else ""})
    return table


@functools.cache
def _defaults() -> dict[str, Any]:
    """Default by dotted key; keys that the user has to give are absent."""
    from ..config.fields import dataclass_in, type_hints

    found: dict[str, Any] = {}

    def collect(cls: type, prefix: str) -> None:
        for field in dataclasses.fields(cls):
            key, nested = prefix + field.name, dataclass_in(type_hints(cls)[field.name])
            if field.default is not dataclasses.MISSING:
                found[key] = field.default
            if nested is not None:
                collect(nested, f"{key}.")

    collect(RunConfig, "")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
