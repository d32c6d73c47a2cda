"""From rows to groups of token ids: rows are read, tokenised, linted and cut to ``max_length``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from ..config.schema import DataConfig
from ..errors import RowError
from .copies import Copies
from .examples import Example, PromptsDifferError
from .faults import text_faults, token_faults
from .groups import PreferenceGroup
from .held_out import is_held_out
from .lint import LintReport
from .lost_text import LostText
from .problems import PROBLEMS
from .row_numbers import response_weights
from .rows import RowReader
from .scored import expand_scores, scores_reversed
from .sets import Split
from .sources import Row
from .tokenize import Encoded, Encoder
from .unpaired import Labels

ROWS_PER_CALL = 512


def read_examples(
    rows: Iterable[Row],
    data: DataConfig,
    read: RowReader,
    report: LintReport,
    split: Split,
    labels: Labels | None = None,
) -> Iterator[Example]:
    """The examples of rows that can be read, without those that belong to the other side of ``data.eval_fraction``.

    Args:
        labels: notes those of unpaired rows.
    """
    for row in rows:
        report.add_row()
        try:
            if row.fault is not None:
                raise row.fault
            example = read(row)
            if data.eval_fraction is not None and is_held_out(example, data.eval_fraction) != (split != "train"):
                report.leave_out_row()
                continue
            if labels is not None:
                labels.note(example, row)
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


def make_groups(
    examples: Iterable[Example],
    encoder: Encoder,
    *,
    max_length: int | None,
    report: LintReport,
    copies: Copies | None = None,
    lost_text: LostText | None = None,
    keep_cut: bool = False,
) -> Iterator[PreferenceGroup]:
    """Tokenise, lint and truncate examples; yield the groups that are left, in order.

    Args:
        keep_cut: give groups what is cut off of their responses, up to the longest that fits behind any prompt.

    Holds ``ROWS_PER_CALL`` examples at a time, and ``Copies`` of what was seen.
    """
    copies, lost_text = copies or Copies(), lost_text or LostText(encoder)
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
                desirable=example.desirable,
                cut=_cut(encoded, room, max_length) if keep_cut else None,
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


def _cut(encoded: Encoded, room: int | None, max_length: int | None) -> tuple[np.ndarray, ...] | None:
    if room is None or max_length is None:
        return None
    return tuple(np.asarray(ids[room : max_length - 1], dtype=np.int32) for ids in encoded.completion_ids)


def _unusable(encoded: Encoded, max_length: int | None) -> str | None:
    """The problem for which a row must be dropped, or None."""
    if not encoded.prompt_ids:
        return "no_prompt_tokens"
    if not all(encoded.completion_ids):
        return "no_completion_tokens"
    if max_length is not None and len(encoded.prompt_ids) >= max_length:
        return "prompt_too_long"
    return None
