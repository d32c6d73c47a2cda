"""The order of a stream's rows: each window is planned as an epoch, and the next is read while one is trained on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..config.schema import PackingConfig, TrainConfig
from ..data.windows import Window, WindowStream
from ..errors import UserError
from ..packing import Pack, Step
from .feed import STEPS_AHEAD, StepBuilder, TrainingFeed, TrainingStep

_FILES_SHOWN = 5

log = logging.getLogger(__name__)

Lookup = Callable[[Pack], np.ndarray] | None


class _Planned(NamedTuple):
    number: int
    """0-based."""
    window: Window
    builder: StepBuilder
    plan: list[Step]


class WindowFeed(TrainingFeed):
    """The steps of a run on a stream. Besides the first window, it holds two.

    Args:
        first: the window that was read first; ``stream`` goes on behind it.
        ready: checks a window before it is used, and gives its references. Called in another thread.
        options: further ones of ``StepBuilder``.
    """

    def __init__(
        self,
        stream: WindowStream,
        first: Window,
        packing: PackingConfig,
        train: TrainConfig,
        *,
        ready: Callable[[Window], Lookup],
        lookup: Lookup,
        **options: Any,
    ):
        super().__init__(first.dataset, packing, train, lookup=lookup, **options)
        self._stream, self._packing, self._ready, self._options = stream, packing, ready, options
        known = first.dataset.pass_rows
        self._per_pass = self.total_steps if known is None else math.ceil(known / packing.pairs_per_step)
        self.steps_per_epoch = math.ceil(len(first.dataset) / packing.pairs_per_step)
        self._current = _Planned(0, first, self.builder, self.builder.plan(self.seed, 0))
        self._places: dict[int, list[Any] | None] = {0: None, 1: first.after}
        """Where windows begin, by number; None is the beginning of the stream."""
        self._ahead: Future[_Planned] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="windows")

    def build(self, number: int) -> TrainingStep:
        """Steps must be asked for in order."""
        window, place = divmod(number - 1, self.steps_per_epoch)
        planned = self._open(window)
        return planned.builder.build(planned.plan[place], number, number / self._per_pass)

    def _open(self, number: int) -> _Planned:
        if self._current.number == number:
            self._read_ahead()
            return self._current
        assert number == self._current.number + 1
        self._read_ahead()
        assert self._ahead is not None
        self._current, self._ahead = self._ahead.result(), None
        self._read_ahead()
        report = self._current.window.report
        if report.dropped:
            log.info("window %d: %s of %s rows dropped", number + 1, f"{report.dropped:,}", f"{report.total:,}")
        return self._current

    def _read_ahead(self) -> None:
        wanted = self._current.number + 1
        if self._ahead is None and wanted * self.steps_per_epoch < self.total_steps:
            self._ahead = self._reader.submit(self._read, wanted)

    def _read(self, number: int) -> _Planned:
        window = self._stream.next()
        builder = StepBuilder(window.dataset, self._packing, lookup=self._ready(window), **self._options)
        # Steps that are done may be some behind those that are built.
        kept = {n: place for n, place in self._places.items() if n >= number - STEPS_AHEAD - 2}
        self._places = kept | {number + 1: window.after}
        return _Planned(number, window, builder, builder.plan(self.seed, number))

    def close(self) -> None:
        self._stream.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def place(self, done: int) -> dict[str, Any] | None:
        window = done // self.steps_per_epoch
        return {"window": window, "begins": self._places[window], "files": self._stream.files}

    def go_on(self, place: dict[str, Any] | None, done: int) -> None:
        window, now = done // self.steps_per_epoch, self._stream.files
        if window == 0:
            return
        if place is not None and (before := place.get("files", now)) != now:
            raise UserError(
                f"cannot resume: the stream was read from {_words(before)}, and is now from {_words(now)}, where the "
                "rows that come next cannot be told: put the files back, or start a new run in another "
                "train.output_dir"
            )
        # Data that was read whole is the first window, and the stream begins again behind it.
        begins = None if place is None else place["begins"]
        if begins is not None:
            self._stream.seek(begins)
        self._places[window] = begins
        self._current = self._current._replace(number=window - 1)


def _words(files: list[list[str] | None]) -> str:
    """The files of all sets."""
    names = [name for of_set in files for name in of_set or ["a name"]]
    return ", ".join(names[:_FILES_SHOWN]) + (
        f" and {len(names) - _FILES_SHOWN} more" if len(names) > _FILES_SHOWN else ""
    )
