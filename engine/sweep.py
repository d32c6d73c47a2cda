"""``dpo sweep``: every run of a sweep, one after the other, and a page that compares them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from . import distributed
from .config.sweep import SweepRun
from .errors import UserError
from .report import default_path, write_comparison
from .train.loop import train
from .train.setup import check_settings

log = logging.getLogger(__name__)


def sweep(runs: Sequence[SweepRun]) -> Path:
    """Train each run, or go on with it where it was left, and write ``comparison.html`` beside them. Under
    ``torchrun``, all processes train each of them together.

    Reference log-probs are those of one store, so that runs on the same data and model compute them once. A sweep that
    was killed is started again with the same call: finished runs are not touched.

    Args:
        runs: in folders beside each other.

    Returns:
        The page.

    Raises:
        UserError: what is wrong with one of them, by its name; for what can be said of a configuration alone, before
            the first one is trained. Runs that are done stay.
        Stopped: the run in progress was asked to end.
    """
    for run in runs:
        with _named(run):
            check_settings(run.config)
    for number, run in enumerate(runs, start=1):
        log.info("run %d of %d: %s", number, len(runs), run.name)
        with _named(run):
            train(run.config, resume=True)
        # What a run held must not wait for the next one's peak.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folders = [Path(done.config.train.output_dir) for done in runs[:number]]
        page = write_comparison(folders) if distributed.is_main() else default_path(folders)
    return page


@contextmanager
def _named(run: SweepRun) -> Iterator[None]:
    """Errors inside say which run they are of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"run {run.name}: {error}") from error
