"""Runs the sections of ``benchmarks.gpu`` in processes of their own, and outlives whatever happens to those.

A process that dies, hangs or loses its device costs the check that it was in: another one goes on behind it. Nothing
here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_child import DEVICE_LOST, LEAST_SECONDS
from benchmarks.gpu_journal import RUNNING, Found, Journal, Row
from benchmarks.gpu_table import Section

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.25
RENDER_SECONDS = 3.0
LOG_BYTES = 2**18
"""Most output of one process that is kept."""
LEAST_STAGE_SECONDS = 10.0
GRACE_SECONDS = 3.0
"""What a section gets beyond its time, in which it may still say what it has."""


class Worker:
    """One process after another for one shard of one section, or for several sections one after another."""

    def __init__(self, run: Run, names: Sequence[str], shard: int, shards: int):
        self.run = run
        self.names = list(names)
        self.shard, self.shards = shard, shards
        self.first = 0
        self.output = run.scratch / f"{names[0]}-{shard}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.logged = 0
        self.killed: str | None = None

    def start(self) -> None:
        seconds = max(0.0, self.run.stage_end - time.monotonic())
        command = [sys.executable, "-m", "benchmarks.gpu_child", self.run.table, str(self.run.journal.path)]
        command += [str(self.run.folder), str(seconds), str(self.first), str(self.shard), str(self.shards)]
        mode = "card" if not self.run.dry_run else "quick" if self.run.one_process else "dry"
        command += [mode, *self.names]
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self.killed, self.logged = None, 0
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Look after the process. False when there is nothing left to do."""
        assert self.process is not None
        self._copy_output()
        code = self.process.poll()
        if code is None:
            self._stop_if_late()
            return True
        # Children of a check that are still there, in the group that the process led.
        _kill_group(self.process.pid)
        self._copy_output()
        if code == 0:
            return False
        return self._go_on_after(code)

    def _stop_if_late(self) -> None:
        assert self.process is not None
        if time.monotonic() > self.run.stage_end + GRACE_SECONDS:
            self.stop("the section's time was over")
            return
        for _, row in self._running():
            if "limit" in row and time.time() - row["began"] > row["limit"]:
                self.stop(f"not done after {row['limit']:.0f} s")

    def stop(self, reason: str) -> None:
        """End the process. Python's fault handler writes where it was."""
        assert self.process is not None
        if self.process.poll() is not None:
            return
        self.killed = reason
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        _kill_group(self.process.pid)
        self.process.wait()

    def _running(self) -> list[tuple[str, Row]]:
        """(section, row) of what this worker's process was in the middle of."""
        found = self.run.read()
        rows = [(name, row) for name in self.names if name in found for row in found[name].rows]
        return [(name, row) for name, row in rows if row["status"] == RUNNING and row.get("shard", 0) == self.shard]

    def _go_on_after(self, code: int) -> bool:
        running = self._running()
        what = self._last_words(code)
        status = "timed out" if self.killed else "died"
        for name, row in running:
            self.run.journal.append("row", name, **{**row, "status": status, **what})
        checks = [(name, row) for name, row in running if "number" in row]
        if code == DEVICE_LOST and not checks:
            checks = self._last_check()
        if not checks:
            for name in self.names[:1]:
                row = {"key": "process", "check": "process", "status": status, **what}
                self.run.journal.append("row", name, **row)
            self.names = self.names[1:]
            self.first = 0
        else:
            name, row = checks[-1]
            self.names = self.names[self.names.index(name) :]
            # A part that is left out from now on is a reason to try the same check again.
            self.first = row["number"] + (0 if len(running) > len(checks) else 1)
        if not self.names or self.run.stage_end - time.monotonic() < LEAST_SECONDS:
            return False
        self.start()
        return True

    def _last_check(self) -> list[tuple[str, Row]]:
        found = self.run.read()
        rows = [(n, row) for n in self.names if n in found for row in found[n].rows if "number" in row]
        return [(n, row) for n, row in rows if row.get("shard", 0) == self.shard][-1:]

    def _last_words(self, code: int) -> Row:
        """Why the process ended, and where, as far as its output tells."""
        text = self.output.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = [line for line in text.partition("Fatal Python error")[0].splitlines() if line.strip()]
        last = f": {said[-1].strip()[:300]}" if said else ""
        columns: Row = {"error": self.killed or f"the process ended with {how}{last}"}
        # The stack that the fault handler wrote: innermost frame first.
        stack = text.rpartition("Fatal Python error")[2] if "Fatal Python error" in text else ""
        places = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stack.partition("Current thread")[2] or stack)
        own = [place for place in places if Path(place[0]).is_relative_to(ROOT)]
        if own:
            columns["where"] = "{}:{} in {}".format(Path(own[0][0]).name, *own[0][1:])
        return columns

    def _copy_output(self) -> None:
        """New lines of the process's output go to the log as they come, up to a size."""
        if not self.output.is_file() or self.logged >= LOG_BYTES:
            return
        with self.output.open("rb") as output:
            output.seek(self.logged)
            new = output.read(LOG_BYTES - self.logged)
        if self.process is not None and self.process.poll() is None:
            new = new[: new.rfind(b"\n") + 1]
        if new:
            self.logged += len(new)
            self.run.log(f"{self.names[0]}.{self.shard}" if self.names else "", new.decode(errors="replace"))


class Run:
    """All sections, stage after stage, within a number of seconds."""

    def __init__(
        self,
        table: str,
        sections: Mapping[str, Section],
        folder: Path,
        scratch: Path,
        *,
        seconds: float,
        dry_run: bool,
        one_process: bool = False,
        go_on: bool = False,
        render: Callable[[], Any],
    ):
        self.table = table
        self.sections = sections
        self.folder = folder
        self.scratch = scratch
        self.dry_run = dry_run
        self.one_process = one_process
        self.go_on = go_on
        self.render = render
        self.journal = Journal(folder / "gpu.jsonl")
        self.end = time.monotonic() + seconds
        self.stage_end = self.end
        self.workers: list[Worker] = []
        """Those with a process."""
        self._rendered = (0.0, -1)
        self._read: tuple[int, dict[str, Found]] = (-1, {})

    def read(self) -> dict[str, Found]:
        """What the journal says, parsed again when it has grown."""
        size = self.journal.path.stat().st_size
        if self._read[0] != size:
            self._read = (size, self.journal.read())
        return self._read[1]

    def log(self, name: str, text: str) -> None:
        with (self.folder / "gpu.log").open("a", errors="replace") as file:
            file.write("".join(f"[{name}] {line}\n" for line in text.splitlines()))

    def everything(self, names: Sequence[str]) -> None:
        """Run the sections ``names``; what earlier runs found of others stays."""
        self.journal.end_torn_line()
        for name in names:
            self.journal.append("due", name)
        stages = {name: 0 if self.one_process else self.sections[name].stage for name in names}
        shares = dict.fromkeys(sorted(set(stages.values())), 0.0)
        for name, stage in stages.items():
            shares[stage] = max(shares[stage], self.sections[name].seconds)
        scale = (self.end - time.monotonic()) / sum(shares.values())
        try:
            for stage in shares:
                later = scale * sum(share for s, share in shares.items() if s > stage)
                self._run_stage([name for name in names if stages[name] == stage], self.end - later)
        finally:
            for worker in self.workers:
                worker.stop("interrupted")
            self._render(force=True)

    def _run_stage(self, names: list[str], end: float) -> None:
        start, self.stage_end = time.monotonic(), end
        if end - start < LEAST_STAGE_SECONDS:
            for name in names:
                left = f"skipped: {max(0.0, end - start):.0f} s were left"
                self.journal.append("end", name, status=left, seconds=0.0)
            return
        known = self.journal.read()
        for name in names:
            self.journal.append("again" if self.go_on and known[name].rows else "start", name)
        if self.one_process:
            self.workers = [Worker(self, names, 0, 1)]
        else:
            shards = [(name, shard) for name in names for shard in range(self.sections[name].shards)]
            self.workers = [Worker(self, [name], shard, self.sections[name].shards) for name, shard in shards]
        owners = {name: [w for w in self.workers if name in w.names] for name in names}
        for worker in self.workers:
            worker.start()
        while self.workers:
            time.sleep(POLL_SECONDS)
            self.workers = [worker for worker in self.workers if worker.poll()]
            for name in [n for n, those in owners.items() if not any(w in self.workers for w in those)]:
                del owners[name]
                self._end_section(name, time.monotonic() - start)
            self._render()

    def _end_section(self, name: str, seconds: float) -> None:
        found = self.read()[name]
        bad = [row for row in found.rows if row["status"] in ("failed", "error", "died", "timed out", RUNNING)]
        status = f"{len(bad)} of {len(found.rows)} rows failed" if bad else "ok"
        skipped = [row["status"] for row in found.rows if row["status"].startswith("skipped")]
        if found.missing():
            status += f"; {len(found.missing())} checks were not reached"
        elif found.rows and len(skipped) == len(found.rows):
            status = f"nothing could run: {skipped[0]}"
        elif not found.rows:
            status = "nothing was found"
        self.journal.append("end", name, status=status, seconds=seconds)
        print(f"{name}: {status}, {seconds:.0f} s", flush=True)

    def _render(self, *, force: bool = False) -> None:
        """Bring the report up to date. A fault in it must not end what it reports on."""
        size = self.journal.path.stat().st_size if self.journal.path.is_file() else 0
        when, last = self._rendered
        if not force and (size == last or time.monotonic() - when < RENDER_SECONDS):
            return
        try:
            self.render()
        except Exception:
            self.log("report", traceback.format_exc())
        self._rendered = (time.monotonic(), size)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
