"""Everything that is to be known of one CUDA machine, in one command and under nine minutes.

    python -m benchmarks.gpu [--output DIR] [--section NAME ...] [--dry-run]

Needs torch, triton, transformers and this repository, which is run in place; peers and figures are there when their
packages import. Sections run one after another, each in a process and a time budget of its own, so that neither a fault
on the device nor a hang loses what the others found. ``--dry-run`` runs the same script on the CPU, on tiny sizes, with
the kernels in Triton's interpreter. The exit code is 1 when a section or a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECTIONS = {
    "environment": 150,
    "checks": 200,
    "head": 170,
    "attention": 60,
    "training": 110,
    "profile": 60,
    "shapes": 90,
}
"""Most seconds of each section; the first import on a fresh machine is slow, the last section is cut first."""
TOTAL_SECONDS = 525


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the results; benchmarks/results/<device> by default")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="run only this; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.record is not None:
        return run_here(options.section[0], options.record, options.output, dry_run=options.dry_run)
    return run_all(options.section or list(SECTIONS), options.output, dry_run=options.dry_run)


def run_here(section: str, record: Path, output: Path, *, dry_run: bool) -> int:
    """Run one section in this process; what it found so far is in ``record`` whatever happens to it."""
    if dry_run:
        # Read by triton when it is imported, and by torch when it looks for devices.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from benchmarks.gpu_sections import RUN, Recorder, SkippedError

    recorder = Recorder(record, output, dry_run=dry_run)
    try:
        RUN[section](recorder)
    except SkippedError as reason:
        recorder["skipped"] = str(reason)
    recorder["complete"] = True
    return 0


def run_all(sections: list[str], output: Path | None, *, dry_run: bool) -> int:
    """Run sections in processes of their own, then write and print the report."""
    # A dry run shares its machine with other tests, and its times mean nothing.
    patience = 4 if dry_run else 1
    deadline = time.monotonic() + patience * TOTAL_SECONDS
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / "results"
        work.mkdir()
        for section in sections:
            seconds = min(patience * SECTIONS[section], deadline - time.monotonic())
            found[section] = _run_section(section, Path(scratch), work, seconds, dry_run=dry_run)
            print(f"{section}: {found[section]['status']} in {found[section]['seconds']:.0f} s", flush=True)
        # Imports torch, for which no section should have to wait.
        from benchmarks.gpu_report import publish

        return publish(found, work, output, dry_run=dry_run)


def _run_section(section: str, scratch: Path, work: Path, seconds: float, *, dry_run: bool) -> dict[str, Any]:
    record = scratch / f"{section}.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", section, "--record", str(record)]
    command += ["--output", str(work), *(["--dry-run"] if dry_run else [])]
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    status, log = "ok", ""
    if seconds <= 0:
        return {"status": "failed: no time was left", "seconds": 0.0, "log": ""}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, timeout=seconds, capture_output=True, text=True, errors="replace"
        )
        log = done.stdout + done.stderr
        if done.returncode:
            status = f"failed: {_last_line(done.stderr) or f'exit code {done.returncode}'}"
    except subprocess.TimeoutExpired as expired:
        log = "".join(part.decode(errors="replace") for part in (expired.stdout, expired.stderr) if part)
        status = f"failed: not done after {seconds:.0f} s"
    values = json.loads(record.read_text()) if record.is_file() else {}
    if status == "ok" and "skipped" in values:
        status = f"skipped: {values['skipped']}"
    return {**values, "status": status, "seconds": time.monotonic() - start, "log": log}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
