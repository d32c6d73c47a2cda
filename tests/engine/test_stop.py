"""What a signal does to a process, by what the process is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine import stop
from engine.errors import Stopped

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("ctrl_c_is_heard")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda v: str(v)
)
def test_a_signal_ends_what_can_be_started_again_at_once(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as found, stop.listening():
        os.kill(os.getpid(), number)
    assert str(found.value) == f"stopped by {number.name}: run the same command again to go on"
    assert found.value.exit_code == code
    assert signal.getsignal(number) == before
    # What this process does next, without listening, is not ended by it.
    stop.check()


def test_a_postponed_request_is_found_once_however_often_launchers_pass_it_on():
    with stop.listening(), stop.postponed("all is saved first"):
        stop.check()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()
    # A request is forgotten with the run that it was for.
    assert stop.requested() == 0


def test_a_request_to_one_process_is_found_by_all(monkeypatch):
    monkeypatch.setattr(stop.distributed, "gather", lambda own: [own, signal.SIGUSR1])
    with pytest.raises(Stopped, match="SIGUSR1"):
        stop.check()


def test_a_signal_that_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested() == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_listen_to_nothing():
    def work() -> None:
        with stop.listening():
            assert signal.getsignal(signal.SIGTERM) == before

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# A lock that is taken twice holds the main thread in a call that no signal interrupts.
_DEADLOCK = "import ctypes; m = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock; lock(m); "


@pytest.mark.parametrize(
    ("inside", "code", "said"),
    [
        (
            "stop.postponed('all is saved first')",
            128 + signal.SIGTERM,
            "SIGTERM: all is saved first; a second signal ends at once\n",
        ),
        ("contextlib.nullcontext()", 75, "stopped by SIGTERM: run the same command again to go on\n"),
    ],
    ids=["a second signal", "nothing to lose"],
)
def test_a_process_inside_a_call_that_does_not_return_ends_all_the_same(inside, code, said):
    again = "os.kill(os.getpid(), 15), time.sleep(0.05)"
    script = (
        "import contextlib, os, threading, time\nfrom engine import stop\n"
        "stop._ECHO_SECONDS, stop._STUCK_SECONDS = 0.0, 0.3\n"
        f"def signals():\n    time.sleep(0.2)\n    {again}\n"
        + ("    time.sleep(0.2)\n    " + again if code > 128 else "")
    )
    body = f"\nthreading.Thread(target=signals).start()\nwith stop.listening(), {inside}:\n    {_DEADLOCK}lock(m)\n"
    ended = subprocess.run([sys.executable, "-c", script + body], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (code, said)
