"""Every causal-LM family of transformers on packs: ``python -m tests.conformance [MODEL_TYPE ...]``.

Without model types: the whole sweep, which writes the table of the installed transformers. With ``--kernels`` blocks
are computed by these, and nothing is written. Exit code 1 when a family is silently wrong or fails. Each family runs in
a process of its own, with a time limit and a memory limit.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import NamedTuple

# before torch: one thread, so that the sweep does not depend on the machine
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import warnings

import transformers

from engine.config.schema import KernelName
from tests.conformance.arguments import Chosen, chosen
from tests.conformance.families import model_types
from tests.conformance.table import path_of, render
from tests.conformance.trial import FAILS, WRONG, Result, first_line, try_family

SECONDS, BYTES = 300, 8 << 30


class _Trial(NamedTuple):
    model_type: str
    process: ForkProcess
    deadline: float


def main(asked: Chosen) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    start = time.monotonic()
    results = _sweep(asked.types or model_types(), asked.kernels, jobs=os.cpu_count() or 1)
    if not asked.types and asked.kernels == "none":
        path_of(transformers.__version__).write_text(render(results), encoding="ascii")
    counts = {v: sum(r.verdict == v for r in results) for v in dict.fromkeys(r.verdict for r in results)}
    print(f"{', '.join(f'{n} {v}' for v, n in counts.items())}, in {time.monotonic() - start:.0f} s")
    return int(any(r.verdict in (FAILS, WRONG) for r in results))


def _sweep(types: list[str], kernels: KernelName, jobs: int) -> list[Result]:
    """Each family in a fork of this process, so that the imports are paid once; in the order of ``types``."""
    context = multiprocessing.get_context("fork")
    waiting = types[::-1]
    running: dict[Connection, _Trial] = {}
    results: dict[str, Result] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(model_type, kernels, sender))
            process.start()
            sender.close()
            running[receiver] = _Trial(model_type, process, time.monotonic() + SECONDS)
        ready = wait(list(running), timeout=1)
        for receiver, trial in list(running.items()):
            if receiver in ready or time.monotonic() > trial.deadline:
                results[trial.model_type] = result = _collect(receiver, trial, receiver in ready)
                del running[receiver]
                _report(result)
    return [results[model_type] for model_type in types]


def _collect(receiver: Connection, trial: _Trial, ready: bool) -> Result:
    reason = f"no result after {SECONDS} s"
    try:
        if ready:
            return receiver.recv()
    except EOFError:
        trial.process.join()
        reason = f"the process ended with exit code {trial.process.exitcode}"
    finally:
        trial.process.kill()
        trial.process.join()
        receiver.close()
    return Result(trial.model_type, "", FAILS, reason=reason)


def _report(result: Result) -> None:
    error = "" if result.logps_error is None else f"{result.logps_error:.1e} {result.grad_error:.1e}"
    print(f"{result.model_type:<26}{result.verdict:<11}{error:<17}{result.reason}", flush=True)


def _child(model_type: str, kernels: KernelName, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        sender.send(try_family(model_type, kernels))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        sender.send(Result(model_type, "", FAILS, reason=f"{first_line(error)} at {where}"))


if __name__ == "__main__":
    sys.exit(main(chosen()))
