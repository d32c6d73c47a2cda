"""``dpo check``: what the data looks like to the model, before anything is trained."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .config.schema import RunConfig
from .data.columns import SHOWN_BY, layouts
from .data.copies import Copies
from .data.groups import PreferenceGroup
from .data.held_out import HeldOut
from .data.lint import LintReport
from .data.mixture import Mixture, counts_of, describe_mixture
from .data.read import stream_set
from .data.row_numbers import NumberSummary
from .data.sets import DataSet, MixtureReport, sets_of, with_rows
from .data.shown import format_example, is_marked, response_names
from .data.tokenize import Encoder
from .data.windows import NO_LENGTH, window_size
from .errors import RowError, UserError
from .inputs import check_inputs
from .model.sources import num_embeddings
from .model.stops import OTHER_END, LearnedStops
from .model.tokenizer import load_tokenizer
from .packing.plan import group_sizes
from .train.terms import LossTerms

PERCENTILES = (0, 50, 90, 99, 100)
LENGTH_BIAS = 0.8
LENGTH_BIAS_PAIRS = 50
"""Of fewer pairs, the share says little."""


class Checked(NamedTuple):
    """What ``dpo check`` found."""

    text: str
    reports: dict[str, LintReport]
    """By split; of a mixture by split and set, such as ``train: ultrafeedback``."""
    obstacles: tuple[str, ...]
    """Why training would stop; empty when it would not."""


def check(config: RunConfig) -> Checked:
    """Read the training data and, where it is set, the evaluation data, a row at a time, and describe them.

    Every row is looked at, those that training would stop at included. Memory is bounded: 8 bytes for each response
    and problem of a row, and what ``Copies`` holds.

    Returns:
        Text with what lint found, token lengths, and the first example decoded with its boundary; it has more than two
        responses where any has.

    Raises:
        UserError: the data or the tokenizer cannot be opened.
    """
    check_inputs(config, tokenizer_only=True)
    tokenizer = load_tokenizer(config.model)
    encoder = Encoder(tokenizer, config.data)
    dated = ""
    if encoder.writes_date:
        # References need torch and models, which rows of other templates do not.
        from .reference.template_date import with_template_date

        config = with_template_date(config, tokenizer, keep=False)
        dated = f"; it writes today's date, pinned to {config.data.template_date} (data.template_date)"
    parts = [f"chat template: {encoder.template_origin}{dated}"]
    reports: dict[str, LintReport] = {}
    obstacles: list[str] = []
    held_out, stops = HeldOut(), LearnedStops(config.model, tokenizer, config.data.max_length)
    for split in ("train", *config.data.eval_splits):
        copies, sets = Copies(), sets_of(config.data, split)
        if split == "train" and config.data.streaming:
            sets = [_first_window(one, config) for one in sets]
            parts.append(f"a stream: of each set the first {window_size(config):,} rows are looked at")
        looks = [_look(config, tokenizer, one, copies, Notes(held_out, stops)) for one in sets]
        if split == "train":
            labels = [sum(len(look.lengths.get(name, ())) for look in looks) for name in ("desirable", "undesirable")]
        else:
            held_out.report(MixtureReport({look.label: look.report for look in looks}))
        needed = with_rows([look.report for look in looks], config.data, split)
        for look in looks:
            name = f"{split}: {look.label}" if look.label else split
            reports[name] = look.report
            head = f"{split.replace('_', ' ', 1)} data{f' of {look.label}' if look.label else ''}"
            parts.append(f"{head}\n{_text(look, config, tokenizer)}")
            obstacles += _obstacles(look, config) if look.report in needed else []
        if split == "train" and config.data.streaming:
            obstacles += _unknown_length(config, sets[0], looks)
        elif config.data.datasets and split == "train":
            parts.append(_epoch(config, looks))
    parts += [f"warning: {words}"] if (words := LossTerms(config.loss).caution) else []
    parts += [f"warning: {words}"] if (words := stops.words()) else []
    parts += [f"warning: {words}"] if (words := LossTerms(config.loss).uneven(*labels)) else []
    parts += [f"training would stop: {reason}" for reason in obstacles]
    return Checked("\n\n".join(parts), reports, tuple(obstacles))


@dataclass
class _Look:
    """What there is to say of one set."""

    label: str
    report: LintReport
    shown: PreferenceGroup | None = None
    lengths: dict[str, array[int]] = field(default_factory=dict)
    groups: int = 0
    several_pairs: bool = False
    numbers: NumberSummary = field(default_factory=NumberSummary)


class Notes(NamedTuple):
    """What is noted over all sets."""

    held_out: HeldOut
    stops: LearnedStops


def _look(config: RunConfig, tokenizer, one: DataSet, copies: Copies, notes: Notes) -> _Look:
    """Read a set to its end."""
    groups, report = stream_set(one, tokenizer, copies, tolerant=True)
    look = _Look(one.label, report)
    embeddings = num_embeddings(config.model)
    note = notes.held_out.trains if one.split == "train" else notes.held_out.evaluates
    for group in groups:
        look.groups += 1
        if look.shown is None or _shows(group) > _shows(look.shown):
            look.shown = group
        look.several_pairs = look.several_pairs or len(group.pairs or ()) > 1
        note(group)
        look.numbers.note(group)
        names = response_names(group)
        for name, ids in zip(("prompt", *names), (group.prompt_ids, *group.response_ids), strict=True):
            look.lengths.setdefault(name, array("i")).append(len(ids))
        for problem in _run_faults(group, config):
            report.add(problem, group.row)
        # Evaluation data teaches nothing.
        if one.split == "train" and notes.stops.note(group):
            report.add(OTHER_END, group.row)
        largest = max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids))
        if embeddings is not None and largest >= embeddings:
            message = f"row {group.label}: token {largest} is outside the {embeddings:,} embeddings of the model"
            report.refuse(RowError("beyond_embedding", message), group.row)
    return look


def _shows(group: PreferenceGroup) -> tuple[bool, bool]:
    """What there is to see in a row: more than two responses, tokens that count differently."""
    return len(group.response_ids) > 2, is_marked(group)


def _first_window(one: DataSet, config: RunConfig) -> DataSet:
    """A set that ends with the rows of one window of a stream."""
    size = window_size(config)
    rows = size if one.data.max_rows is None else min(size, one.data.max_rows)
    return replace(one, data=replace(one.data, max_rows=rows))


def _unknown_length(config: RunConfig, first: DataSet, looks: Sequence[_Look]) -> list[str]:
    """Why the length of a run on a stream cannot be known, where it cannot."""
    if config.train.max_steps > 0:
        return []
    whole = replace(first, data=config.data).open().count
    known = len(looks) == 1 and (whole is not None or looks[0].groups < window_size(config))
    return [] if known else [NO_LENGTH]


def _text(look: _Look, config: RunConfig, tokenizer) -> str:
    parts = [look.report.format()]
    if SHOWN_BY in parts[0]:
        parts.append(layouts())
    if look.shown is not None:
        parts += [_format_lengths(look.lengths, config.data.max_length)]
        if config.loss.unpaired and look.shown.desirable is None:
            parts += ["each pair becomes two rows: the chosen response is desirable, the rejected one is not"]
        parts += [f"rows: {words}"] if (words := look.numbers.words()) else []
        parts += [format_example(look.shown, tokenizer)]
    return "\n\n".join(parts)


def _obstacles(look: _Look, config: RunConfig) -> list[str]:
    reasons = _verdicts(look.report, config.data.strict)
    terms, numbers = LossTerms(config.loss), look.numbers
    if look.several_pairs and (reason := terms.against_several_pairs):
        reasons.append(f"{look.report.source}: {reason}")
    given = {"weights": numbers.has("weight"), "margins": numbers.has("margin"), "tokens": numbers.weighs_tokens}
    if reason := terms.against_numbers(**given):
        reasons.append(f"{look.report.source}: {reason}")
    return reasons


def _epoch(config: RunConfig, looks: Sequence[_Look]) -> str:
    """How much of each set an epoch takes; of sets without a row, nothing can be said."""
    sizes = [max(look.groups, 1) for look in looks]
    mixture = Mixture(tuple(sizes), counts_of(config.data.datasets, sizes))
    lines = describe_mixture(mixture, [look.label for look in looks])
    return "\n".join([f"an epoch takes {mixture.per_epoch:,} rows", *(f"  {line}" for line in lines)])


def _run_faults(group: PreferenceGroup, config: RunConfig) -> Iterator[str]:
    """Problems that a row has with the rest of the configuration."""
    if group.desirable is not None:
        if not config.loss.unpaired:
            yield "unpaired"
    elif len(group.response_ids) != 2 and group.pairs is None and "plackett_luce" not in config.loss.loss_types:
        yield "not_a_pair"
    sizes = np.array([len(group.prompt_ids), *map(len, group.response_ids)])
    if group_sizes([sizes], share_prompts=config.packing.share_prompts)[0] > config.packs.tokens_per_pack:
        yield "over_budget"


def _verdicts(report: LintReport, strict: bool) -> list[str]:
    """Why training would stop at what lint found."""
    reasons = [f"reading ended after {report.total:,} rows: {report.ended}"] if report.ended else []
    if report.stopping:
        names = ", ".join(name for name in report.counts if report.stops(name))
        reasons.append(f"{report.source}: {report.stopping:,} of {report.total:,} rows cannot be used ({names})")
    # Rows that stop training are named above; that none is left says no more.
    empty = [] if report.stopping else [report.raise_if_empty]
    for stop in (*empty, report.raise_if_promptless, lambda: report.raise_if_strict(strict)):
        try:
            stop()
        except UserError as error:
            reasons.append(str(error))
    return reasons


def _format_lengths(lengths: dict[str, array[int]], max_length: int | None) -> str:
    """A table of percentiles of token counts."""
    names = {0: "min", 50: "median", 100: "max"}
    heads = [names.get(p, f"{p}%") for p in PERCENTILES] + ["mean", "total"]
    limit = "no limit" if max_length is None else f"prompt + response at most {max_length:,}"
    lines = [f"tokens ({limit})", "  " + " " * 12 + "".join(f"{head:>12}" for head in heads)]
    for name, sizes in lengths.items():
        cells = [f"{value:,.0f}" for value in np.percentile(sizes, PERCENTILES, method="nearest")]
        cells += [f"{np.mean(sizes):,.1f}", f"{sum(sizes):,}"]
        lines.append(f"  {name:<12}" + "".join(f"{cell:>12}" for cell in cells))
    if set(lengths) == {"prompt", "chosen", "rejected"}:
        lines.append(f"  {_length_bias(lengths['chosen'], lengths['rejected'])}")
    return "\n".join(lines)


def _length_bias(chosen: array[int], rejected: array[int]) -> str:
    """How far length alone tells the sides apart."""
    a, b = np.asarray(chosen), np.asarray(rejected)
    longer, shorter = float(np.mean(a > b)), float(np.mean(a < b))
    text = f"chosen is longer than rejected in {longer:.1%} of pairs, shorter in {shorter:.1%}"
    if len(a) < LENGTH_BIAS_PAIRS or max(longer, shorter) < LENGTH_BIAS:
        return text
    return f"{text}: length alone nearly tells them apart, and a model learns that first"
