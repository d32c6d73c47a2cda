"""From a source to groups of token ids: a split read whole, or the first window of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config.schema import DataConfig
from ..errors import UserError, raise_all
from .copies import Copies
from .examples import Example
from .groups import PreferenceDataset, PreferenceGroup
from .lint import LintReport
from .make_groups import make_groups, read_examples
from .mixture import Mixture, counts_of
from .problems import LOST
from .row_cache import rows_of
from .rows import RowReader
from .sets import DataSet, MixtureReport, Report, Split, sets_of, with_rows
from .sources import Row, Source
from .tokenize import Encoder
from .unpaired import Labels, unpaired
from .windows import WindowStream


def load_dataset_groups(
    data: DataConfig, tokenizer, *, split: Split, unpair: bool = False
) -> tuple[PreferenceDataset, Report]:
    """Read one split and turn its rows into token ids.

    Args:
        data: the ``data`` section. ``max_rows`` limits the source rows of either split, in a mixture of each set.
        tokenizer: a transformers tokenizer.
        split: ``train`` reads ``dataset_name`` or ``datasets``; ``eval`` reads ``eval_dataset_name``, or where that is
            not set, the split ``eval_dataset_split`` of ``dataset_name``, or of each set its ``eval_split``;
            ``eval_NAME`` reads one of several of ``eval_dataset_name``.
        unpair: make a pair two unpaired rows, and keep what is cut off of responses.

    Returns:
        The groups that can be trained on, in source order, and what lint found. ``group.row`` is the row's index in the
        source, so it skips dropped rows. A mixture holds all groups of its sets; ``PreferenceDataset.epoch`` draws.
        With ``data.streaming``, the training data is that of the first window.

    Raises:
        UserError: the data cannot be read, no row is left, or ``data.strict`` and lint found something.
    """
    if data.streaming and split == "train":
        window = WindowStream(data, tokenizer, size=data.stream_window).next()
        return window.dataset, window.report
    sets = sets_of(data, split)
    make = partial(_make_rows, sets, tokenizer, unpair=unpair)
    # Rows that are kept by content have no labels, and no tokens that were cut off.
    dataset, reports = make() if unpair else rows_of(sets, data, tokenizer, make)
    report = reports[""] if "" in reports else MixtureReport(reports)
    report.raise_if_strict(data.strict)
    for part in with_rows(list(reports.values()), data, split):
        part.raise_if_empty()
        part.raise_if_promptless()
    if split == "train" and data.datasets:
        sizes = tuple(np.bincount(dataset.sources, minlength=len(sets)).tolist())
        dataset.mixture = Mixture(sizes, counts_of(data.datasets, sizes))
    return dataset, report


def _make_rows(sets: Sequence[DataSet], tokenizer, *, unpair: bool) -> tuple[PreferenceDataset, dict[str, LintReport]]:
    copies = Copies()
    reports: dict[str, LintReport] = {}

    def groups() -> Iterator[PreferenceGroup]:
        for one in sets:
            of_set, reports[one.label] = stream_set(one, tokenizer, copies, keep_cut=unpair)
            yield from unpaired(of_set) if unpair else of_set

    return PreferenceDataset(groups()), reports


def stream_set(
    one: DataSet, tokenizer, copies: Copies | None = None, *, tolerant: bool = False, keep_cut: bool = False
) -> tuple[Iterator[PreferenceGroup], LintReport]:
    """The groups of one set, and what lint finds, which is complete when the groups are used up.

    Args:
        copies: of the rows of earlier sets, which a row may repeat.
        tolerant: rows that training would stop at are counted and left out.
        keep_cut: as in ``make_groups``.
    """
    data = one.data
    encoder = Encoder(tokenizer, data)
    source = one.open(tolerant=tolerant)
    counted = LOST if data.lost_text == "count" else frozenset()
    report = LintReport(source.name, tolerant=tolerant, counted=counted)
    read, labels = RowReader(data, use_messages=encoder.use_messages), Labels()
    whole = source if one.split != "train" or not data.streaming else source.read_on()
    rows = tqdm(_until_damage(whole, report), desc=f"read {source.name}", unit=" rows", delay=3, disable=None)
    examples = chain(read_examples(rows, data, read, report, one.split, labels), _at_the_end(read, report, labels))
    options: dict[str, Any] = {"copies": copies, "keep_cut": keep_cut}
    groups = make_groups(examples, encoder, max_length=data.max_length, report=report, **options)
    return (replace(group, source=one.label) for group in groups) if one.label else groups, report


def open_rows(data: DataConfig, *, split: Split) -> Source:
    """The rows of a split that is no mixture, as they are in the source; ``Row.index`` is ``PreferenceGroup.row``.

    Can be iterated more than once, and holds no rows.
    """
    (one,) = sets_of(data, split)
    return one.open()


def check_files(data: DataConfig, *, splits: Sequence[str] = ("train", "eval"), first_rows: bool = True) -> None:
    """Open local data; what is on the Hub waits.

    Args:
        splits: the training data, the evaluation data with all its sets, or both.
        first_rows: also read the first row, and further ones until every column that ``data.columns`` names was found.

    Raises:
        UserError: no such data, a first row that no layout has, or a column that no row has; for all sets at once.
    """
    evaluated = data.eval_splits if "eval" in splits else ()
    asked = [*(split for split in splits if split == "train"), *evaluated]
    sets = [one for split in asked for one in sets_of(data, split) if not one.on_hub]
    raise_all(partial(_check_set, one, first_rows) for one in sets)


def _check_set(one: DataSet, first_rows: bool) -> None:
    rows = one.open()
    read = RowReader(one.data, use_messages=False)
    for row in rows if first_rows else ():
        if not read.layout:
            read.decide(row)
        if not read.lacks(row):
            return
    if absent := read.absent_column():
        raise absent[0]


def _until_damage(source: Iterable[Row], report: LintReport) -> Iterator[Row]:
    """The rows of a source; where it cannot be read to its end, a tolerant report notes why, and they end."""
    try:
        yield from source
    except UserError as error:
        if not (report.tolerant and report.total):
            raise
        report.ended = str(error)


def _at_the_end(read: RowReader, report: LintReport, labels: Labels) -> Iterator[Example]:
    """None: at the end of the rows, what their labels say together is noted, and a column that none of them had."""
    for problem, index in labels.problems():
        report.add(problem, index)
    if (absent := read.absent_column()) and not report.ended:
        report.refuse(*absent)
    yield from ()
