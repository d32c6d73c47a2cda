"""Training: from a configuration to a run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from .. import distributed
from ..config.schema import RunConfig
from ..inputs import check_inputs
from ..memory_errors import memory_errors
from ..model.division import divide_work
from ..run_folder import hold_folder
from ..shared_folders import check_shared
from . import checkpoint as checkpoints
from .describe import describe_run
from .resume import TrainResult, find_start
from .run import Run
from .setup import OnData, check_settings, prepare
from .trackers import Callback

log = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    on_data: OnData | None = None,
    callbacks: Sequence[Callback] = (),
    forecast: Callable[[], str] = str,
) -> TrainResult:
    """Train as ``config`` says and leave a run folder. Under ``torchrun``, all processes train one model.

    Args:
        resume: continue from the newest complete checkpoint of ``train.output_dir``, to the same bits that a run
            without the interruption ends with; start anew when there is none. Otherwise the folder must not hold a
            run. Another number of processes continues to rounding.
        on_data: is told of the data before the model is loaded.
        callbacks: called with the step and the values of every row of metrics, those of evaluations included, on the
            first process. What they raise ends the run as a crash would: checkpoints stay.
        forecast: what the run was expected to need, in words, for when memory runs out.

    Raises:
        UserError: whatever the user can correct, too little memory, a loss or gradient that is not finite, or a full
            disk. Checkpoints that were complete stay so.
        Stopped: on all ranks, when any process was asked to end; steps that are done are in a checkpoint.
    """
    with memory_errors(config, trains=True, figures=forecast), distributed.process_group():
        distributed.set_timeout(config.train.timeout_minutes)
        divide_work(config)
        output_dir = Path(config.train.output_dir)
        main = distributed.is_main()
        if main and not resume:
            # First what another folder would not help.
            check_settings(config)
            check_inputs(config, first_rows=True)
            checkpoints.refuse_other_run(output_dir)
        # Held from here on: whether the folder is free must not change while model and data are loaded.
        with hold_folder(output_dir) if main else nullcontext():
            found = find_start(config, output_dir, resume) if main else (None, None)
            start, finished = distributed.broadcast(found)
            check_shared(output_dir, f"train.output_dir={output_dir}")
            if finished is not None:
                log.info("%s is finished: nothing is left to train", output_dir)
                return finished
            setup = prepare(config, start, on_data=on_data)
            log.info("%s", describe_run(setup))
            run = Run(setup, output_dir, callbacks)
            if start is not None:
                run.restore(start)
            return run.train()
