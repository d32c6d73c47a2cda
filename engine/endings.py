"""How several processes end together when one of them fails: who speaks, who only ends, and with which exit code."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_FAREWELL_SECONDS = 60.0
"""How long the host of the store stays for processes that live, which look once a second unless they are starved."""
_LISTEN_SECONDS = 1.0
_ROLL_CALL_SECONDS = 3.0


class PeerFailure(Exception):  # noqa: N818
    """The run ends because of another process, which has said why. To be ended with, not to be shown."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def end_of_run(error: BaseException, store: Store, ear: Ear, *, places: Sequence[str], minutes: float) -> BaseException:
    """Take leave of the others after ``error``; what this process ends with, which is its own error for the first.

    Args:
        places: machine and process of each rank, once it is known.
        minutes: how long processes wait for each other.
    """
    first = False if isinstance(error, PeerFailure) else _claim_failure(store, _exit_code(error))
    lost = lost_connection(error)
    silent = _roll_call(store) if first and lost else []
    code = _first_exit_code(store) if first is False else ear.exit_code
    _take_leave(store, counted=ear.heard, lost=len(silent))
    if first is False or (ear.heard and (lost or first is None)):
        return PeerFailure(str(error), code)
    if not lost:
        return error
    if _timed_out(error):
        what = (
            f"this process has waited more than {minutes:g} minutes (train.timeout_minutes) for another one, "
            "which reads a model or data slowly, or hangs"
        )
    elif first:
        who = "".join(f": rank {rank}, {places[rank]}" for rank in silent[:1] if places)
        what = f"a process of this run ended without a message{who} (killed, or out of memory?)"
    else:
        who = f" ({places[0]})" if places else ""
        what = f"the first process of this run ended{who}; if it gave no reason, it was killed (out of memory?)"
    return UserError(f"{what}: look at its machine's log, then continue with --resume")


def _exit_code(error: BaseException) -> int:
    """What the command line makes of an error."""
    return int(getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 2))


class Ear(threading.Thread):
    """Listens for the first process that fails, which says why.

    Connections of a sharded model stay open until the process that failed ends, and with it may end the store: a
    process that waits for them all that time could not tell a host that has spoken from one that was killed.
    """

    def __init__(self, store: Store):
        super().__init__(daemon=True)
        self._store = store.clone()  # type: ignore[attr-defined]
        self._stopped = threading.Event()
        self.heard = False
        self.exit_code = 2
        """That of the process which failed, once it was heard."""

    def run(self) -> None:
        with suppress(RuntimeError):
            while not self._stopped.wait(_LISTEN_SECONDS):
                if self._store.check(["failures"]):
                    self.exit_code = _first_exit_code(self._store)
                    self.heard = True
                    _answer(self._store)
                    return

    def claim(self, code: int, speak: Callable[[], None]) -> None:
        """Take leave beside the main thread, which does not return: the others then end with the exit code ``code``.

        Args:
            speak: called when this process is the first that ends, to say why.
        """
        self._stopped.set()
        self.join()
        if _claim_failure(self._store, code):
            speak()
        _await_others(self._store, counted=self.heard)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def _claim_failure(store: Store, code: int) -> bool | None:
    """Whether this process is the first to fail, with the exit code ``code``. None where the host of the store is gone:
    it has spoken for all, or it was killed."""
    try:
        store.compare_set("exit code", "", str(code))
        return store.add("failures", 1) == 1
    except RuntimeError:
        return None


def _first_exit_code(store: Store) -> int:
    with suppress(RuntimeError):
        if store.check(["exit code"]):
            return int(store.get("exit code"))
    return 2


def _answer(store: Store) -> int:
    """Tell the process that failed that this one lives; how many have."""
    store.set(f"lives/{os.environ['RANK']}", "")
    return store.add("gone", 1)


def _roll_call(store: Store) -> list[int]:
    """Ranks other than this that do not answer, as those do within a second that live."""
    silent = [rank for rank in range(int(os.environ["WORLD_SIZE"])) if str(rank) != os.environ["RANK"]]
    deadline = time.monotonic() + _ROLL_CALL_SECONDS
    with suppress(RuntimeError):
        while silent and time.monotonic() < deadline:
            time.sleep(0.05)
            silent = [rank for rank in silent if not store.check([f"lives/{rank}"])]
    return silent


def _take_leave(store: Store, *, counted: bool, lost: int) -> None:
    """Close the connections, so that the others fail, too; the host of the store stays until they have looked."""
    import torch.distributed as dist

    if not dist.get_backend().endswith("nccl"):
        # With nccl in flight this could wait for ever; the end of the process closes those.
        with suppress(RuntimeError):
            dist.destroy_process_group()
    _await_others(store, counted=counted, lost=lost)


def _await_others(store: Store, *, counted: bool, lost: int = 0) -> None:
    """Say that this process has looked; the host of the store waits until all have.

    Args:
        counted: whether this process has said so before.
        lost: processes that will not.
    """
    hosts = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + _FAREWELL_SECONDS
    with suppress(RuntimeError):
        gone = store.add("gone", 0) if counted else _answer(store)
        while hosts and gone < int(os.environ["WORLD_SIZE"]) - lost and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = store.add("gone", 0)


def lost_connection(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that another process is gone. Who looks at errors of a model's
    forward must let these through: a sharded model talks to the others there."""
    from torch.distributed import DistError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DistError) or (isinstance(seen, RuntimeError) and "gloo" in str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _timed_out(error: BaseException) -> bool:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return any("Timed out waiting" in str(cause) for cause in causes)
