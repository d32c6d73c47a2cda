"""Everything that is to be known of one CUDA machine, in one command and within a number of seconds.

    python -m benchmarks.gpu [--out DIR] [--seconds N] [--sections a,b] [--dry-run]

Needs torch, triton, transformers and this repository, which is run in place; peers and figures are there when their
packages import. First come checks of everything, side by side, then measurements, one at a time, in the order of their
importance. Every check and every contender is a row that is written when it is known, to gpu.jsonl, and from there to
gpu.json and gpu.md; each section has processes of its own, which are replaced when they die, hang, or lose the device.
A further run with the same folder replaces the sections that it runs and keeps the others; ``--continue`` runs what
did not end well, and of a section the checks that failed or were not reached. ``--dry-run`` runs the same on the CPU,
on tiny sizes, with the kernels in Triton's interpreter.
The exit code is 1 when a check failed or a section did not end.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_journal import Journal
from benchmarks.gpu_report import draw, failures, publish, summary
from benchmarks.gpu_runner import Run
from benchmarks.results import RESULTS, dashed

SECONDS = 570.0
"""A command on a machine that is lent may take ten minutes."""
DRY_SECONDS = 1800.0
"""A dry run shares its machine with other tests, and its times mean nothing."""


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    sections = importlib.import_module(options.table).SECTIONS
    names = options.sections.split(",") if options.sections else list(sections)
    unknown = [name for name in names if name not in sections]
    if unknown:
        print(f"error: no section {', '.join(unknown)}; there are {', '.join(sections)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as scratch:
        folder = options.out or default_folder(Path(scratch), dry_run=options.dry_run)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(
            options.table,
            sections,
            folder,
            Path(scratch),
            seconds=options.seconds or (DRY_SECONDS if options.dry_run else SECONDS),
            dry_run=options.dry_run,
            one_process=options.one_process,
            go_on=options.go_on,
            render=lambda: publish(folder, sections, dry_run=options.dry_run),
        )
        if options.go_on:
            ended = {name for name, found in run.journal.read().items() if found.status == "ok"}
            names = [name for name in names if name not in ended]
        run.everything(names)
        found = Journal(folder / "gpu.jsonl").read()
        draw(folder, found)
        print(summary(found, dry_run=options.dry_run))
        kept = not folder.is_relative_to(scratch)
        print(f"results are in {folder}" if kept else "a dry run without --out keeps nothing")
        return 1 if failures(found) else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    found.add_argument("--out", "--output", type=Path, help="folder for the results; $OUT, or results/<device>")
    found.add_argument("--seconds", type=float, help=f"for everything; {SECONDS:g} by default")
    found.add_argument("--sections", help="run only these, with commas between them")
    found.add_argument("--continue", action="store_true", dest="go_on", help="run only what has not ended well")
    found.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    found.add_argument("--one-process", action="store_true", help="everything in one process, and less of it")
    found.add_argument("--table", default="benchmarks.gpu_sections", help="module with the sections")
    return found


def default_folder(scratch: Path, *, dry_run: bool) -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    if dry_run:
        return scratch / "results"
    name = "cuda"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        name = dashed((done.stdout.splitlines() or [""])[0]) or name
    return RESULTS / name


if __name__ == "__main__":
    # An orderly end: the processes of the sections are stopped, the report is written.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
