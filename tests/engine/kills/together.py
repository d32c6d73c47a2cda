"""Runs of two processes: started together as torchrun does, killed in part or all at once, and what those that are
left must do by themselves: end soon, with one line that says why."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.durable import is_complete
from tests.engine.kills.evidence import FaultError
from tests.engine.kills.victim import Job, Trap

if TYPE_CHECKING:
    from tests.engine.kills.cases import Case
    from tests.engine.kills.harness import Attempt, Harness

RUN_SECONDS, SURVIVOR_SECONDS = 300.0, 60.0
"""How long a run may take, and how long a process may live on after another one of its run has ended."""
_LOOK_SECONDS = 0.01
SAID = ("process of this run ended", "killed", "continue with --resume")


class Asked(float):
    """Seconds after the start at which a process is asked to end, with SIGTERM."""


@dataclass(frozen=True)
class Strike:
    """Where one process of a run is killed or asked to end, or all of them."""

    rank: int
    moment: Trap | float
    """Seconds after the start, or where the process kills itself."""
    everyone: bool
    agent: bool
    """Whether the store that the processes meet in belongs to an agent that lives on, or to rank 0."""

    @property
    def who(self) -> str:
        return "all" if self.everyone else f"rank {self.rank}"

    def __str__(self) -> str:
        return f"{self.moment} of {self.who} ({'agent' if self.agent else 'own'} store)"


class Team:
    """The processes of one run."""

    def __init__(self, harness: Harness, place: Path, arguments: list[str], case: Case, strike: Strike | None):
        self.harness = harness
        self.place = place
        self.strike = strike
        self.since = time.monotonic()
        self.pids: list[int] = []
        self.awaited = False
        """Whether a process that had not yet met the others was ended from outside, as the agent of torchrun does."""
        environment = self._meeting_point(case.ranks, agent=strike is not None and strike.agent)
        for rank in range(case.ranks):
            journal, output = (str(path(place, rank)) for path in (journal_path, output_path))
            trap = strike.moment if strike is not None and rank == strike.rank else None
            job = Job(
                arguments,
                journal,
                output,
                trap=trap if isinstance(trap, Trap) else None,
                slow_seconds=case.slow_seconds,
                environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                leader=self.pids[0] if self.pids else 0,
            )
            self.pids.append(harness.parent.start(job))

    def _meeting_point(self, ranks: int, *, agent: bool) -> dict[str, str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if agent:
            from torch.distributed import TCPStore

            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port = self.store.port
        agents = {"TORCHELASTIC_USE_AGENT_STORE": str(agent), "TORCHELASTIC_RESTART_COUNT": "0"}
        return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **agents}

    def end(self) -> list[Attempt]:
        """Strike, wait until all processes have ended, and read what each reported.

        Raises:
            FaultError: one did not end.
        """
        if self.strike is not None and isinstance(self.strike.moment, float):
            while time.monotonic() < self.since + self.strike.moment and not all(map(ended, self.pids)):
                time.sleep(_LOOK_SECONDS)
            number = signal.SIGTERM if isinstance(self.strike.moment, Asked) else signal.SIGKILL
            if self.strike.everyone:
                os.killpg(self.pids[0], number)
            else:
                os.kill(self.pids[self.strike.rank], number)
        late = self._wait()
        codes = [self.harness.parent.wait(pid) for pid in self.pids]
        seconds = time.monotonic() - self.since
        found = [self.harness.report(self.place, rank, code=code, seconds=seconds) for rank, code in enumerate(codes)]
        if late is not None:
            raise FaultError(
                f"{self.strike}: rank {late} lived on for {SURVIVOR_SECONDS:.0f} s: {found[late].output[-6000:]}"
            )
        return found

    def _wait(self) -> int | None:
        """Wait until all have ended; the rank of one that did not, and was ended by force."""
        alive = list(range(len(self.pids)))
        looks = int(RUN_SECONDS / _LOOK_SECONDS)
        # Counted, not timed: a machine that is suspended for a while lets no process end.
        while alive and looks > 0:
            time.sleep(_LOOK_SECONDS)
            looks -= 1
            left = [rank for rank in alive if not ended(self.pids[rank])]
            if left and len(left) < len(alive):
                looks = int(SURVIVOR_SECONDS / _LOOK_SECONDS)
                self._release(left)
            alive = left
        if not alive:
            return None
        os.kill(self.pids[alive[0]], signal.SIGABRT)
        time.sleep(1.0)
        os.killpg(self.pids[0], signal.SIGKILL)
        return alive[0]

    def _release(self, left: list[int]) -> None:
        """End those that wait for one that will never come: how long that may take is up to the launcher."""
        for rank in left:
            if self.strike is not None and '"joined"' not in journal_path(self.place, rank).read_text():
                self.awaited = True
                with suppress(ProcessLookupError):
                    os.kill(self.pids[rank], signal.SIGTERM)


def journal_path(place: Path, rank: int) -> Path:
    return place / f"journal{f'.{rank}' if rank else ''}"


def output_path(place: Path, rank: int) -> Path:
    return place / f"output{f'.{rank}' if rank else ''}"


def ended(pid: int) -> bool:
    """Whether a child of another process has ended; it stays listed until that one has asked for it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def check_survivors(team: Team, found: list[Attempt]) -> None:
    """Hold those that were not killed to their word.

    Raises:
        FaultError: one ended in silence or with more than a line, or as if nothing had happened in a run that is not
            finished.
    """
    left = {rank: attempt for rank, attempt in enumerate(found) if attempt.code != -signal.SIGKILL}
    if len(left) == len(found):
        return
    for rank, attempt in left.items():
        told = [line for line in attempt.output.splitlines() if line.startswith("error:")]
        if attempt.code == 0:
            run = team.place / "run"
            if run.is_dir() and not is_complete(run):
                raise FaultError(f"{team.strike}: rank {rank} ended with code 0 in a run that is not finished")
        elif team.awaited and attempt.code in (-signal.SIGTERM, 75):
            continue
        elif (
            attempt.code != 2
            or len(told) != 1
            or not all(word in told[0] for word in SAID)
            or "Traceback" in attempt.output
        ):
            raise FaultError(f"{team.strike}: rank {rank} ended with code {attempt.code}: {attempt.output[-6000:]}")


def joined_report(found: list[Attempt]) -> dict[str, Any]:
    """What the processes of a run reported, as one: that of rank 0, or of one that was killed, with all that any of
    them holds for durable."""
    killed = [attempt for attempt in found if attempt.code == -signal.SIGKILL]
    failed = [attempt for attempt in found if attempt.code != 0]
    # One that was asked to end before it listened ends the others as one does that is killed.
    deaf = [attempt for attempt in found if attempt.code == -signal.SIGTERM]
    return {
        "code": (killed or deaf or failed or found)[0].code,
        "phase": (killed or found)[0].phase,
        "saved": [step for attempt in found for step in attempt.saved],
        "written": [key for attempt in found for key in attempt.written],
        "output": "\n".join(attempt.output for attempt in found),
        "opened": found[0].opened,
        "stepped": found[0].stepped,
        "changes": found[0].changes,
        "all_changes": [attempt.changes for attempt in found],
        "seconds": found[0].seconds,
    }
