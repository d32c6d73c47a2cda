"""The rows of a run: read and checked together, those of training and of evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..config.schema import RunConfig
from ..data import Report, load_dataset_groups
from ..data.groups import PreferenceDataset
from ..data.held_out import HeldOut
from ..model.stops import LearnedStops
from ..packing import check_fits
from .feed import drawn_groups
from .objective import Objective

log = logging.getLogger(__name__)


def load_data(
    config: RunConfig, tokenizer: Any, objective: Objective
) -> tuple[dict[str, PreferenceDataset], dict[str, Report]]:
    datasets: dict[str, PreferenceDataset] = {}
    lint: dict[str, Report] = {}
    for split in ("train", *config.data.eval_splits):
        datasets[split], lint[split] = load_dataset_groups(config.data, tokenizer, split=split)
        if split == "train":
            _note_stops(config, tokenizer, datasets[split], lint[split])
            datasets[split] = drawn_groups(config, datasets[split])
        objective.check_dataset(datasets[split])
        check_fits(
            datasets[split],
            tokens_per_pack=config.packing.tokens_per_pack,
            share_prompts=config.packing.share_prompts,
            in_rows=config.packing.layout == "rows",
        )
    if config.data.has_evaluation:
        warn_of_trained_rows(datasets, lint, config.data.strict)
    return datasets, lint


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
