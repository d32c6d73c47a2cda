"""From a source to groups of token ids: rows are read, tokenised, linted and cut to ``max_length``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
from tqdm import tqdm

from ..config.schema import DataConfig
from ..errors import RowError, UserError, raise_all
from .copies import Copies
from .examples import Example, PromptsDifferError
from .faults import text_faults, token_faults
from .groups import PreferenceDataset, PreferenceGroup
from .held_out import is_held_out
from .lint import LintReport
from .lost_text import LostText
from .mixture import Mixture, counts_of
from .problems import LOST, PROBLEMS
from .row_numbers import response_weights
from .rows import RowReader
from .scored import expand_scores, scores_reversed
from .sets import DataSet, MixtureReport, Report, Split, sets_of, with_rows
from .sources import Row, Source
from .tokenize import Encoded, Encoder

ROWS_PER_CALL = 512


def load_dataset_groups(data: DataConfig, tokenizer, *, split: Split) -> tuple[PreferenceDataset, Report]:
    """Read one split and turn its rows into token ids.

    Args:
        data: the ``data`` section. ``max_rows`` limits the source rows of either split, in a mixture of each set.
        tokenizer: a transformers tokenizer.
        split: ``train`` reads ``dataset_name`` or ``datasets``; ``eval`` reads ``eval_dataset_name``, or where that is
            not set, the split ``eval_dataset_split`` of ``dataset_name``, or of each set its ``eval_split``;
            ``eval_NAME`` reads one of several of ``eval_dataset_name``.

    Returns:
        The groups that can be trained on, in source order, and what lint found. ``group.row`` is the row's index in the
        source, so it skips dropped rows. A mixture holds all groups of its sets; ``PreferenceDataset.epoch`` draws.

    Raises:
        UserError: the data cannot be read, no row is left, or ``data.strict`` and lint found something.
    """
    sets, copies = sets_of(data, split), Copies()
    reports: dict[str, LintReport] = {}

    def groups() -> Iterator[PreferenceGroup]:
        for one in sets:
            of_set, reports[one.label] = stream_set(one, tokenizer, copies)
            yield from of_set

    dataset = PreferenceDataset(groups())
    report = reports[""] if "" in reports else MixtureReport(reports)
    report.raise_if_strict(data.strict)
    for part in with_rows(list(reports.values()), data, split):
        part.raise_if_empty()
        part.raise_if_promptless()
    if split == "train" and data.datasets:
        sizes = tuple(np.bincount(dataset.sources, minlength=len(sets)).tolist())
        dataset.mixture = Mixture(sizes, counts_of(data.datasets, sizes))
    return dataset, report


def stream_set(
    one: DataSet, tokenizer, copies: Copies | None = None, *, tolerant: bool = False
) -> tuple[Iterator[PreferenceGroup], LintReport]:
    """The groups of one set, and what lint finds, which is complete when the groups are used up.

    Args:
        copies: of the rows of earlier sets, which a row may repeat.
        tolerant: rows that training would stop at are counted and left out.
    """
    data = one.data
    encoder = Encoder(tokenizer, data)
    source = one.open(tolerant=tolerant)
    counted = LOST if data.lost_text == "count" else frozenset()
    report = LintReport(source.name, tolerant=tolerant, counted=counted)
    examples = _examples(source, data, encoder, report, one.split)
    groups = make_groups(examples, encoder, max_length=data.max_length, report=report, copies=copies)
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


def _until_damage(source: Source, report: LintReport) -> Iterator[Row]:
    """The rows of a source; where it cannot be read to its end, a tolerant report notes why, and they end."""
    try:
        yield from source
    except UserError as error:
        if not (report.tolerant and report.total):
            raise
        report.ended = str(error)


def _examples(
    source: Source, data: DataConfig, encoder: Encoder, report: LintReport, split: Split
) -> Iterator[Example]:
    read = RowReader(data, use_messages=encoder.use_messages)
    rows = tqdm(_until_damage(source, report), desc=f"read {source.name}", unit=" rows", delay=3, disable=None)
    for row in rows:
        report.add_row()
        try:
            if row.fault is not None:
                raise row.fault
            example = read(row)
            if data.eval_fraction is not None and is_held_out(example, data.eval_fraction) != (split != "train"):
                report.leave_out_row()
                continue
            if scores_reversed(row):
                report.add("scores_reversed", row.index)
            if example.scores is not None:
                expanded = expand_scores(example, data, report)
                if expanded is None:
                    continue
                example = expanded
        except PromptsDifferError:
            report.add("differing_prompts", row.index)
        except RowError as error:
            report.refuse(error, row.index)
        else:
            yield example
        finally:
            report.layout = read.layout
    if (absent := read.absent_column()) and not report.ended:
        report.refuse(*absent)


def make_groups(
    examples: Iterable[Example],
    encoder: Encoder,
    *,
    max_length: int | None,
    report: LintReport,
    copies: Copies | None = None,
) -> Iterator[PreferenceGroup]:
    """Tokenise, lint and truncate examples; yield the groups that are left, in order.

    Holds ``ROWS_PER_CALL`` examples at a time, and ``Copies`` of what was seen.
    """
    copies, lost_text = copies or Copies(), LostText(encoder)
    stream = iter(examples)
    while chunk := list(islice(stream, ROWS_PER_CALL)):
        kept: list[PreferenceGroup] = []
        for example, encoded in _encode_around_faults(chunk, encoder, report):
            if not _whole(example, encoded, lost_text, report):
                continue
            dropped = _unusable(encoded, max_length)
            if dropped is not None:
                report.add(dropped, example.row)
                continue
            room = _room(encoded, max_length)
            try:
                weights = response_weights(example, encoded.completion_ids, encoded.left_out, room)
            except RowError as error:
                report.refuse(error, example.row)
                continue
            if not all(w.any() for w in weights or ()):
                report.add("nothing_counts", example.row)
                continue
            group = PreferenceGroup(
                row=example.row,
                prompt_ids=np.asarray(encoded.prompt_ids, dtype=np.int32),
                response_ids=tuple(np.asarray(ids[:room], dtype=np.int32) for ids in encoded.completion_ids),
                ref_logps=example.ref_logps,
                pairs=example.pairs,
                weight=example.weight,
                margin=example.margin,
                token_weights=weights,
            )
            for problem in (*text_faults(example, encoder), *token_faults(encoded, group, encoder)):
                report.add(problem, example.row)
            kept.append(group)
        for problem, row in copies.find(kept):
            report.add(problem, row)
        yield from kept


def _whole(example: Example, encoded: Encoded, lost_text: LostText, report: LintReport) -> bool:
    """Whether the row may be used, though its chat template may leave out something that the report only counts."""
    usable = True
    for lost in lost_text.find(example, encoded.rendered) if encoded.rendered else ():
        advice = PROBLEMS[lost.problem].advice
        message = f"{example.where}: {lost.place} is not in what the chat template writes; {advice}"
        report.refuse(RowError(lost.problem, message), example.row)
        usable = usable and not report.stops(lost.problem)
    return usable


def _encode_around_faults(
    examples: Sequence[Example], encoder: Encoder, report: LintReport
) -> Iterator[tuple[Example, Encoded]]:
    """Encode in one call; where a row stops that and the report takes faults, leave out only those."""
    try:
        encoded = encoder.encode(examples)
    except RowError as error:
        if len(examples) == 1 or not report.tolerant:
            report.refuse(error, examples[0].row)
            return
        middle = len(examples) // 2
        for half in (examples[:middle], examples[middle:]):
            yield from _encode_around_faults(half, encoder, report)
    else:
        yield from zip(examples, encoded, strict=True)


def _room(encoded: Encoded, max_length: int | None) -> int | None:
    return None if max_length is None else max_length - len(encoded.prompt_ids)


def _unusable(encoded: Encoded, max_length: int | None) -> str | None:
    """The problem for which a row must be dropped, or None."""
    if not encoded.prompt_ids:
        return "no_prompt_tokens"
    if not all(encoded.completion_ids):
        return "no_completion_tokens"
    if max_length is not None and len(encoded.prompt_ids) >= max_length:
        return "prompt_too_long"
    return None
