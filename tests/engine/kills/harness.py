"""Kill ``dpo precompute`` and ``dpo train`` at random moments, again and again, and see what is lost.

A run is killed with SIGKILL, or asked to end with SIGTERM, one to three times and then resumed to its end. One that was
asked must end with exit code 75 and in one line, and have a checkpoint of every step that it had done. Half of the
kills come at a random time, the others at a random change of the file system while a shard, a checkpoint or the final
model is written or an old checkpoint deleted. After every kill, what the run had reported as durable must be there and
whole; at the end, all that the run leaves must be equal, bit for bit, to what the same run leaves when nobody kills it.

Some runs write their checkpoints beside the steps, slowly, so that steps are done meanwhile. A third of the runs are of
two processes. One of them is killed, or both at once; the one that is left must end by itself and say why in one line,
and the run is resumed on two processes: see ``together``.

``make kill`` does it a hundred times; ``test_kills.py`` twenty-one times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.kills.cases import CASES, Case, write_config, write_inputs
from tests.engine.kills.evidence import FaultError, InexactError, age_temporaries, compare, leavings, newest_checkpoint
from tests.engine.kills.evidence import stored_values as read_store
from tests.engine.kills.together import Asked, Strike, Team, check_survivors, joined_report, journal_path, output_path
from tests.engine.kills.victim import DISK_PHASES, START, STEPS, Job, Trap

ROOT = Path(__file__).resolve().parents[3]
KILLS_OF_A_RUN = (1, 1, 1, 2, 2, 3)
"""Each run draws one of these."""
Moment = Trap | float | Strike
"""A process kills itself, is killed after some seconds, or either of these for one of several or for all of them."""
_TRIES = 20


class Parent:
    """The process that forks the victims."""

    def __init__(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        offline = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.kills.victim"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | threads | offline,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the parent of the victims has died"
        return line.strip()

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def start(self, job: Job) -> int:
        """The process id of a child that runs ``job``."""
        return self._ask(job.encode())

    def wait(self, pid: int) -> int:
        """The exit code of a child; -9 when it was killed."""
        return self._ask(f"wait {pid}")

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Attempt:
    """One process of a run: how it ended and what it reported."""

    code: int
    seconds: float
    phase: str
    """In which it ended."""
    saved: list[int]
    """Steps whose checkpoints it reported as durable."""
    written: list[str]
    """Keys, in hexadecimal, whose log-probs it reported as durable."""
    changes: dict[str, int]
    """Changes of the file system by phase."""
    output: str
    opened: bool
    """Whether it came as far as to open its run folder, after it had said where it continues."""
    stepped: int = 0
    """Steps that it did."""
    all_changes: list[dict[str, int]] = field(default_factory=list)
    """Those of every process."""


@dataclass
class Baseline:
    """The run of a case that nobody killed."""

    seconds: float
    changes: dict[str, int]
    all_changes: list[dict[str, int]]
    """Those of every process."""
    left: dict[str, Any]
    values: dict[str, str]


@dataclass
class Tally:
    """What happened in all runs."""

    seed: int
    runs: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    """By phase."""
    asked: Counter[str] = field(default_factory=Counter)
    """Runs that were asked to end, and did, by phase."""
    of_several: Counter[str] = field(default_factory=Counter)
    """Those of runs of several processes, by who was killed."""
    lost: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        phases, asked, several = (
            ", ".join(f"{key} {count}" for key, count in sorted(c.items())) or "none"
            for c in (self.kills, self.asked, self.of_several)
        )
        return (
            f"{sum(self.runs.values())} runs, {sum(self.kills.values())} kills and {sum(self.asked.values())} requests "
            f"to end (seed {self.seed}) in {self.seconds:.0f} s: {len(self.lost)} losses, {len(self.inexact)} inexact "
            f"resumes; kills by phase: {phases}; requests by phase: {asked}; of several processes: {several}"
        )


class Harness:
    """Kills runs below a folder.

    Args:
        folder: empty; holds inputs, the runs that nobody kills, and runs that went wrong.
        seed: of the moments.
    """

    def __init__(self, parent: Parent, folder: Path, *, seed: int):
        self.parent = parent
        self.folder = folder
        self.random = random.Random(seed)
        self.tally = Tally(seed)
        self._baselines: dict[str, Baseline] = {}
        write_inputs(folder)

    def start(self, case: Case, place: Path, *, resume: bool = False, **limits: Any) -> int:
        """Start the command of a case in ``place``, which has its configuration, with limits of a ``Job``."""
        arguments = self._arguments(case, place, resume)
        paths = str(journal_path(place, 0)), str(output_path(place, 0))
        return self.parent.start(Job(arguments, *paths, slow_seconds=case.slow_seconds, **limits))

    def _arguments(self, case: Case, place: Path, resume: bool) -> list[str]:
        return [case.command, str(place / "run.yaml"), *(["--resume"] if resume else [])]

    def finish(self, pid: int, place: Path, since: float) -> Attempt:
        """Wait for what ``start`` started and read what it reported."""
        code = self.parent.wait(pid)
        return self.report(place, code=code, seconds=time.monotonic() - since)

    def report(self, place: Path, rank: int = 0, *, code: int = 0, seconds: float = 0.0) -> Attempt:
        """What the last process that ran in ``place`` reported, one of several or the only one."""
        lines = [json.loads(line) for line in journal_path(place, rank).read_text().splitlines()]
        return Attempt(
            code,
            seconds,
            next((line["phase"] for line in reversed(lines) if "phase" in line), START),
            [line["saved"] for line in lines if "saved" in line],
            [key for line in lines for key in line.get("keys", ())],
            {line["left"]: line["changes"] for line in lines if "left" in line},
            output_path(place, rank).read_text(errors="replace"),
            any(line.get("phase") == "open" for line in lines),
            sum("stepped" in line for line in lines),
        )

    def attempt(
        self, case: Case, place: Path, moment: Moment | None = None, *, resume: bool = False, **limits: Any
    ) -> Attempt:
        """Run the command; it is killed by a trap, or after some seconds, or not at all.

        Raises:
            FaultError: a process did not end after the death of another one of its run, or not as it must.
        """
        since = time.monotonic()
        for rank in range(case.ranks):
            for path in (journal_path(place, rank), output_path(place, rank)):
                path.write_text("")
        if case.ranks > 1:
            assert not isinstance(moment, (Trap, float))
            team = Team(self, place, self._arguments(case, place, resume), case, moment)
            found = team.end()
            check_survivors(team, found)
            return Attempt(**joined_report(found))
        assert not isinstance(moment, Strike)
        trap = moment if isinstance(moment, Trap) else None
        pid = self.start(case, place, resume=resume, trap=trap, **limits)
        if isinstance(moment, float):
            time.sleep(max(0.0, since + moment - time.monotonic()))
            # Not yet waited for, so the number still means this child, dead or alive.
            os.kill(pid, signal.SIGTERM if isinstance(moment, Asked) else signal.SIGKILL)
        return self.finish(pid, place, since)

    def baseline(self, name: str) -> Baseline:
        """The run of a case without a kill; the first call runs it."""
        if name not in self._baselines:
            case, place = CASES[name], self.folder / name / "whole"
            if not case.own_store and not (self.folder / "store").exists():
                # The shared store gets its rows here, so that runs of such cases find them, killed or not.
                self._succeed(CASES["evaluated"], self.folder / "filler")
            found = self._succeed(case, place)
            values = read_store(place / "store") if case.own_store else {}
            self._baselines[name] = Baseline(found.seconds, found.changes, found.all_changes, leavings(place), values)
        return self._baselines[name]

    def _succeed(self, case: Case, place: Path) -> Attempt:
        write_config(case, self.folder, place)
        found = self.attempt(case, place)
        assert found.code == 0, found.output
        return found

    def run(self, name: str, *, kills: int | None = None) -> None:
        """Kill one run of a case, resume it to its end, and count what went wrong.

        Args:
            kills: how often it is killed; one to three times when absent.
        """
        place = self.folder / name / str(self.tally.runs[name])
        baseline = self.baseline(name)
        begin = time.monotonic()
        run = _KilledRun(self, CASES[name], place, baseline)
        try:
            run.go(kills or self.random.choice(KILLS_OF_A_RUN))
        except FaultError as fault:
            kind = self.tally.inexact if isinstance(fault, InexactError) else self.tally.lost
            kind.append(f"{place}, killed {' and '.join(run.history)}: {fault}")
        else:
            shutil.rmtree(place)
        self.tally.runs[name] += 1
        self.tally.seconds += time.monotonic() - begin

    def draw(self, baseline: Baseline, case: Case) -> Moment:
        """A moment to kill at."""
        if case.ranks == 1:
            return self._draw_moment(baseline, baseline.changes)
        # One of them, or all at once.
        rank, everyone = self.random.randrange(case.ranks), self.random.random() < 1 / (1 + case.ranks)
        agent = self.random.random() < 0.5
        return Strike(rank, self._draw_moment(baseline, baseline.all_changes[rank], everyone), everyone, agent)

    def _draw_moment(self, baseline: Baseline, changes: dict[str, int], everyone: bool = False) -> Trap | float:
        asked = self.random.random() < 0.4
        if self.random.random() < 0.5:
            seconds = self.random.uniform(0.0, baseline.seconds)
            return Asked(seconds) if asked else seconds
        phase = self.random.choice([phase for phase in DISK_PHASES if changes.get(phase)])
        when = "asked" if asked else self.random.choice(("before", "after", "torn"))
        return Trap(phase, self.random.randrange(changes[phase]), when, everyone)


class _KilledRun:
    """One run that is killed and resumed, and what it must not lose."""

    def __init__(self, harness: Harness, case: Case, place: Path, baseline: Baseline):
        self.harness = harness
        self.case = case
        self.place = place
        self.baseline = baseline
        self.history: list[str] = []
        self.saved: set[int] = set()
        self.durable: set[str] = set()
        self.newest: int | None = None

    def go(self, kills: int) -> None:
        for _ in range(_TRIES):
            write_config(self.case, self.harness.folder, self.place)
            if self._is_killed(resume=False):
                break
            # The moment came after the end.
            shutil.rmtree(self.place)
        else:
            raise AssertionError(f"{_TRIES} runs ended before they were killed")
        for _ in range(kills - 1):
            self._is_killed(resume=self.case.command == "train")
        found = self.harness.attempt(self.case, self.place, resume=self.case.command == "train")
        if found.code != 0:
            raise FaultError(f"the resumed run ended with code {found.code}: {found.output[-2000:]}")
        self._check_reuse(found)
        compare(leavings(self.place), self.baseline.left)
        if self.case.own_store:
            compare(read_store(self.place / "store"), self.baseline.values)
            left = [str(path) for path in (self.place / "store").rglob("*") if path.is_file() and path.suffix == ".tmp"]
            if left:
                raise FaultError(f"left over: {left}")

    def _is_killed(self, *, resume: bool) -> bool:
        """Run until a random moment; False when the run ended before it."""
        moment = self.harness.draw(self.baseline, self.case)
        found = self.harness.attempt(self.case, self.place, moment, resume=resume)
        if found.code == 0:
            return False
        blow = moment.moment if isinstance(moment, Strike) else moment
        asked = isinstance(blow, Asked) or (isinstance(blow, Trap) and blow.when == "asked")
        if asked:
            self._check_stopped(found)
        elif found.code != -signal.SIGKILL:
            raise FaultError(f"a run ended by itself with code {found.code}: {found.output[-2000:]}")
        if asked:
            # It has left all phases, so where it was asked is seen from what sprang or from what it did.
            where = blow.phase if isinstance(blow, Trap) else (STEPS if found.stepped else START)
            self.harness.tally.asked[where] += 1
        else:
            self.harness.tally.kills[found.phase] += 1
        if isinstance(moment, Strike):
            self.harness.tally.of_several[moment.who] += 1
        self.history.append(f"in phase {found.phase} by {moment}")
        self._check_reuse(found)
        self.saved |= set(found.saved)
        before = self.newest or 0
        self.newest = newest_checkpoint(self.place / "run", self.saved)
        if asked and found.stepped and (self.newest or 0) != before + found.stepped:
            raise FaultError(f"asked to end after step {before + found.stepped}, it left the one of {self.newest}")
        if self.case.own_store:
            self._check_store(set(found.written))
        return True

    def _check_stopped(self, found: Attempt) -> None:
        """How a run ends that is asked to: by the signal itself where it has not yet, or no more, anything to do."""
        told = [line for line in found.output.splitlines() if line.startswith(("stopped by", "error:"))]
        if found.code == -signal.SIGTERM and found.phase == START:
            return
        if found.code != 75 or len(told) != 1 or not told[0].startswith("stopped by SIGTERM"):
            raise FaultError(f"a run that was asked to end did with code {found.code}: {found.output[-2000:]}")
        if "Traceback" in found.output:
            raise FaultError(f"a run that was asked to end failed: {found.output[-2000:]}")

    def _check_store(self, written: set[str]) -> None:
        values = read_store(self.place / "store")
        lost = (self.durable | written) - values.keys()
        if lost:
            raise FaultError(f"{len(lost)} log-probs were durable and are gone")
        if not values.items() <= self.baseline.values.items():
            raise InexactError("a stored log-prob differs from the one without a kill")
        self.durable = set(values)
        age_temporaries(self.place / "store")

    def _check_reuse(self, found: Attempt) -> None:
        """What was durable before this process must be used by it."""
        again = self.durable & set(found.written)
        if again:
            raise FaultError(f"{len(again)} durable log-probs were computed again")
        started = re.search(r"continuing after step (\d+)", found.output)
        finished = "nothing is left to train" in found.output
        if found.opened and not finished and (int(started[1]) if started else None) != self.newest:
            raise FaultError(f"continued after step {started and started[1]}, and {self.newest} was durable")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random moments and see what is lost.")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn when absent")
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="only these cases")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    names = options.case or list(CASES)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    print(f"seed {seed}, in {folder}", flush=True)
    with Parent() as parent:
        harness = Harness(parent, folder, seed=seed)
        for number in range(options.runs):
            harness.run(names[number % len(names)])
            if (number + 1) % 10 == 0:
                print(harness.tally.summary(), flush=True)
    tally = harness.tally
    for line in tally.lost + tally.inexact:
        print(line)
    print(tally.summary())
    if options.json is not None:
        options.json.write_text(json.dumps(vars(tally), indent=1) + "\n")
    if tally.lost or tally.inexact:
        print(f"the runs that went wrong are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
