"""The process in which sections of ``benchmarks.gpu`` run: check after check, each leaving a row.

    python -m benchmarks.gpu_child TABLE JOURNAL FOLDER SECONDS FIRST SHARD SHARDS card|dry|quick SECTION ...

``FIRST`` is the number of the first section's first check: where a process that died left off.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import resource
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu_journal import NO_TIME, RUNNING, Journal
from benchmarks.gpu_table import Check, Context, Section, SkippedError, first_line, place

DEVICE_LOST = 70
"""Exit code of a process that CUDA refuses any further work."""
LEAST_SECONDS = 3.0
"""A check that has less than this is not begun."""


def main(arguments: list[str]) -> int:
    faulthandler.enable()
    # A process that is stopped tells where it was; its memory, which is large, is of no use.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    table, journal, folder, seconds, first, shard, shards, mode, *names = arguments
    _end_with_parent()
    if mode != "card":
        # Read by triton when it is imported, and by torch when it looks for devices.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    context = Context(
        journal=Journal(Path(journal)),
        folder=Path(folder),
        dry_run=mode != "card",
        quick=mode == "quick",
        deadline=time.monotonic() + float(seconds),
        shard=int(shard),
    )
    sections: dict[str, Section] = importlib.import_module(table).SECTIONS
    for number, name in enumerate(names):
        run_section(context, name, sections[name], int(first) if number == 0 else 0, int(shards))
    return 0


def run_section(context: Context, name: str, section: Section, first: int, shards: int) -> None:
    """This shard's checks of a section, from number ``first`` on."""
    context.section, context.check = name, "the list of checks"
    found = context.journal.read()[name]
    rows, unsettled = found.by_key, found.unsettled()
    context.dead = frozenset(key for key, row in rows.items() if row["status"] in ("died", "timed out"))
    try:
        checks = list(section.checks(context))
    except Exception as error:
        context.journal.append("row", name, key=context.check, check=context.check, **error_columns(error))
        return
    context.journal.append("plan", name, names=[check.name for check in checks])
    for number, check in enumerate(checks):
        known = check.name in rows and check.name not in unsettled
        if number >= first and number % shards == context.shard and not known:
            run_check(context, check, number)


def run_check(context: Context, check: Check, number: int) -> None:
    """One check, with everything that it may end with but the end of the process."""
    context.check = check.name
    common: dict[str, Any] = {"key": check.name, "check": check.name, "number": number, "shard": context.shard}
    if check.bound is not None:
        common["bound"] = check.bound
    if context.seconds_left() < LEAST_SECONDS:
        context.journal.append("row", context.section, **common, status=NO_TIME)
        return
    limit = min(check.seconds * (8 if context.dry_run else 1), context.seconds_left() + 5)
    context.journal.append("row", context.section, **common, status=RUNNING, began=time.time(), limit=limit)
    start = time.perf_counter()
    try:
        columns = verdict(check, check.run())
        # What a kernel did wrong is told by the next call that waits for it: here, not in the next check.
        context.synchronize()
    except SkippedError as reason:
        columns = {"status": f"skipped: {reason}"}
    except Exception as error:
        columns = error_columns(error)
    seconds = time.perf_counter() - start
    context.journal.append("row", context.section, **{**common, **columns, "seconds": seconds})
    if columns["status"] == "error" and not context.dry_run and _device_is_lost():
        os._exit(DEVICE_LOST)
    context.free_memory()


def verdict(check: Check, result: Any) -> dict[str, Any]:
    """Columns from what a check returned; NaN is never right."""
    if isinstance(result, dict):
        columns = dict(result)
        good = columns.pop("ok", True)
        return {"status": "ok" if good else "failed", **columns}
    if result is None:
        return {"status": "ok"}
    good = check.bound is None or result <= check.bound
    return {"status": "ok" if good else "failed", "value": result}


def error_columns(error: BaseException) -> dict[str, Any]:
    """Type, first line, and where; the whole of it is printed."""
    traceback.print_exception(error)
    return {"status": "error", "error": f"{type(error).__name__}: {first_line(error)}", "where": place(error)}


def _device_is_lost() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").sum().item()
    except torch.cuda.OutOfMemoryError:
        return False
    except Exception as error:
        print(f"the device takes no more work: {first_line(error)}", file=sys.stderr)
        return True
    return False


def _end_with_parent() -> None:
    """Leave the device when the process that started this one is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # All is written; what a driver does on its way out must not look like a failure.
    os._exit(code)
