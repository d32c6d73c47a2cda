"""The rows of a run: read and checked together, those of training and of evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config.schema import RunConfig
from ..data import Report, load_dataset_groups
from ..data.groups import PreferenceDataset
from ..data.held_out import HeldOut
from ..data.windows import NO_LENGTH, Window, WindowStream, window_size
from ..errors import UserError
from ..model import Policy
from ..model.readable import check_dataset
from ..model.stops import LearnedStops
from ..packing import check_fits
from .mismatched import loss_groups
from .objective import Objective

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """The data of a run."""

    datasets: dict[str, PreferenceDataset]
    """``train``, of a stream its first window, and those of evaluation, by ``DataConfig.eval_splits``."""
    lint: dict[str, Report]
    stream: WindowStream | None = None
    first: Window | None = None


def load_data(config: RunConfig, tokenizer: Any, objective: Objective) -> Loaded:
    """Read the data of a run.

    Raises:
        UserError: it cannot be read or trained on, or ``data.strict`` and lint found something.
    """
    datasets: dict[str, PreferenceDataset] = {}
    lint: dict[str, Report] = {}
    stream = first = None
    for split in ("train", *config.data.eval_splits):
        if split == "train" and config.data.streaming:
            stream, first = open_stream(config, tokenizer)
            dataset, lint[split] = first.dataset, first.report
        else:
            dataset, lint[split] = load_dataset_groups(config.data, tokenizer, split=split, unpair=config.loss.unpaired)
        if split == "train":
            _note_stops(config, tokenizer, dataset, lint[split])
            good = int(dataset.desirable_G.sum())
            if words := objective.uneven(good, int(dataset.labelled_G.sum()) - good):
                log.warning("%s", words)
        datasets[split] = loss_groups(config, dataset, split=split)
        check_rows(config, objective, datasets[split])
    if config.data.has_evaluation:
        warn_of_trained_rows(datasets, lint, config.data.strict)
    return Loaded(datasets, lint, stream, first)


def open_stream(config: RunConfig, tokenizer: Any) -> tuple[WindowStream, Window]:
    """The training data as a stream, and its first window.

    Raises:
        UserError: it cannot be read, or how long the run is cannot be known.
    """
    stream = WindowStream(config.data, tokenizer, size=window_size(config))
    first = stream.next()
    first.dataset.pass_rows = stream.rows
    if stream.rows is None and config.train.max_steps <= 0:
        raise UserError(NO_LENGTH)
    return stream, first


def read_training_rows(config: RunConfig, tokenizer: Any) -> tuple[PreferenceDataset, Report]:
    """The training data, of a stream its first window, and what lint found.

    Raises:
        UserError: as ``load_dataset_groups`` and ``open_stream``.
    """
    if not config.data.streaming:
        return load_dataset_groups(config.data, tokenizer, split="train", unpair=config.loss.unpaired)
    _, first = open_stream(config, tokenizer)
    return first.dataset, first.report


def check_rows(config: RunConfig, objective: Objective, dataset: PreferenceDataset) -> None:
    """Raise a ``UserError`` for rows that the loss, or a pack, does not take."""
    objective.check_dataset(dataset)
    check_fits(
        dataset,
        tokens_per_pack=config.packs.tokens_per_pack,
        processes=config.train.context_parallel,
        share_prompts=config.packing.share_prompts,
        in_rows=config.packing.layout == "rows",
    )


def check_window(config: RunConfig, tokenizer: Any, policy: Policy, objective: Objective, window: Window) -> None:
    """For a later window of a stream, all that is asked of a first one.

    Raises:
        UserError: its rows cannot be trained on, or ``data.strict`` and lint found something.
    """
    check_rows(config, objective, window.dataset)
    check_dataset(policy, window.dataset)
    if config.data.strict:
        LearnedStops(config.model, tokenizer, config.data.max_length).look_at(window.dataset, window.report)
        window.report.raise_if_strict(True)


def _note_stops(config: RunConfig, tokenizer: Any, dataset: PreferenceDataset, report: Report) -> None:
    """Note which rows teach the model to stop where generation does not."""
    stops = LearnedStops(config.model, tokenizer, config.data.max_length)
    stops.look_at(dataset, report)
    if words := stops.words():
        log.warning("%s", words)
    report.raise_if_strict(config.data.strict)


def warn_of_trained_rows(datasets: Mapping[str, PreferenceDataset], lint: Mapping[str, Report], strict: bool) -> None:
    """Note in the reports of the evaluation data which of its rows are trained on, and say how many.

    Raises:
        UserError: there are some, and ``strict``.
    """
    held_out = HeldOut()
    for group in datasets["train"]:
        held_out.trains(group)
    for split, dataset in datasets.items():
        if split == "train":
            continue
        for group in dataset:
            held_out.evaluates(group)
        if found := held_out.report(lint[split]):
            log.warning(
                "%s of %s evaluation rows%s are not held out: row or prompt is trained on, too (`dpo check` says "
                "which)",
                f"{found:,}",
                f"{len(dataset):,}",
                "" if split == "eval" else f" of {split.removeprefix('eval_')}",
            )
        lint[split].raise_if_strict(strict)
