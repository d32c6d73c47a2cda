"""Every causal-LM family of transformers on packs: ``python -m tests.conformance [MODEL_TYPE ...]``.

Without model types: the whole sweep, which writes ``docs/conformance.md``. Exit code 1 when a family is silently wrong
or fails. Each family runs in a process of its own, with a time limit and a memory limit.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import time
import traceback
from multiprocessing.connection import Connection

# before torch: one thread, so that the sweep does not depend on the machine
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import warnings

import transformers

from tests.conformance.families import model_types
from tests.conformance.table import PATH, render
from tests.conformance.trial import EQUAL, FAILS, NOT_BUILT, REFUSED, Result, first_line, try_family

SECONDS, BYTES = 120, 8 << 30


def main(chosen: list[str]) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    start = time.monotonic()
    results = []
    for model_type in chosen or model_types():
        results.append(_in_child(model_type))
        result = results[-1]
        error = "" if result.logps_error is None else f"{result.logps_error:.1e} {result.grad_error:.1e}"
        print(
            f"{model_type:<26}{result.verdict:<11}{error:<17} {'local' if result.local else '':<6}{result.reason}",
            flush=True,
        )
    if not chosen:
        PATH.write_text(render(results), encoding="ascii")
    counts = {v: sum(r.verdict == v for r in results) for v in dict.fromkeys(r.verdict for r in results)}
    print(f"{', '.join(f'{n} {v}' for v, n in counts.items())}, in {time.monotonic() - start:.0f} s")
    return int(any(r.verdict not in (EQUAL, REFUSED, NOT_BUILT) for r in results))


def _in_child(model_type: str) -> Result:
    """Fork, so that the imports are paid once."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(model_type, sender))
    child.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        reason = f"no result after {SECONDS} s"
    except EOFError:
        child.join()
        reason = f"the process ended with exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()
    return Result(model_type, "", FAILS, reason=reason)


def _child(model_type: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        sender.send(try_family(model_type))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        sender.send(Result(model_type, "", FAILS, reason=f"{first_line(error)} at {where}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
