"""The processes that are killed: ``dpo`` commands in children forked from one process that has imported everything.

Imports take seconds and a run takes one, so a parent imports once and forks a child for every line of its input. A
child runs the command line itself, and beside it

- writes to its journal which phase of its work begins and ends, and what became durable, so that the harness knows
  after a kill what must not be lost;
- kills itself at the n-th change of the file system within a phase, when its job says so: just before, just after, or
  with half of the bytes written. All of this is done to the modules of the child, none of it in the product.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import faulthandler
import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

START, STEPS = "start", "steps"
DISK_PHASES = ("shard", "open", "checkpoint", "prune", "evaluation", "export")
"""Phases in which files that must survive are written, renamed or deleted."""
WRITER = "checkpoint"
"""Name of the thread that writes checkpoints beside the steps."""
_NO_CAPABILITIES = (0x20080522, (0,) * 6)
"""The version and the sets of ``capset``."""


@dataclass(frozen=True)
class Trap:
    """Where a child kills itself, or asks itself to end."""

    phase: str
    nth: int
    """Of the file-system changes in that phase, counted from 0."""
    when: str
    """``before``, ``after``, or ``torn``: after half of the bytes, where bytes are written; else after. ``asked``
    sends SIGTERM before. ``full`` kills nobody: from there on the disk takes no new file and no byte."""
    everyone: bool = False
    """Whether all processes of the run are meant, not this one alone."""


@dataclass(frozen=True)
class Job:
    """One ``dpo`` command."""

    arguments: list[str]
    journal: str
    output: str
    """File for what the command prints."""
    trap: Trap | None = None
    powerless: bool = False
    """Whether permissions bind the command even if root runs it."""
    file_bytes: int | None = None
    """No file may become larger: the system refuses the write."""
    disk_bytes: int | None = None
    """The run folder is a disk of its own, of this size; what it held at the end is in the folder afterwards."""
    slow_seconds: float = 0.0
    """How long every change of the file system takes that is made beside the steps."""
    environment: dict[str, str] | None = None
    """Of one of several processes of a run: what torchrun would set."""
    leader: int = 0
    """The first of these processes, which leads their process group; 0 for itself."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Job:
        values = json.loads(line)
        trap = values.pop("trap")
        return cls(**values, trap=None if trap is None else Trap(**trap))


class Journal:
    """What a child has done, one JSON value a line; every line is written at once and survives the child."""

    def __init__(self, path: str):
        self._write = os.write
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(self, **values: Any) -> None:
        self._write(self._descriptor, (json.dumps(values) + "\n").encode())


class Observer:
    """Follows the phases of a child, counts its changes of the file system, and springs the trap."""

    def __init__(self, journal: Journal, trap: Trap | None, slow_seconds: float):
        self.journal = journal
        self.trap = trap
        self._slow_seconds = slow_seconds
        self._steps = [START]
        self._beside: list[str] = []
        """Phases of the thread that writes beside the steps."""
        self.counts: Counter[str] = Counter()
        self.full = False

    @property
    def phases(self) -> list[str]:
        """Of this thread; threads that flush and add checksums have those of the thread that they help."""
        if threading.current_thread() is threading.main_thread():
            return self._steps
        return self._beside if threading.current_thread().name == WRITER else self._beside or self._steps

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        phases = self.phases
        phases.append(name)
        self.journal.note(phase=name)
        try:
            yield
        finally:
            phases.pop()
            self.journal.note(phase=(phases or self._steps)[-1], left=name, changes=self.counts[name])

    def change(self, call: Callable, *arguments: Any, half: Callable | None = None, **options: Any) -> Any:
        phase = (self.phases or self._steps)[-1]
        if self.phases is self._beside:
            time.sleep(self._slow_seconds)
        number = self.counts[phase]
        self.counts[phase] += 1
        here = self.trap is not None and (self.trap.phase, self.trap.nth) == (phase, number)
        if here and self.trap.when == "before":
            self.die()
        if here and self.trap.when == "asked":
            self.strike(signal.SIGTERM)
            here = False
        if here and self.trap.when == "full":
            self.full, here = True, False
        if self.full and call not in self.harmless:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if here and half is not None and self.trap.when == "torn":
            return half()
        result = call(*arguments, **options)
        if here:
            self.die()
        return result

    def die(self) -> None:
        self.journal.note(phase=(self.phases or self._steps)[-1])
        self.strike(signal.SIGKILL)

    def strike(self, number: int) -> None:
        self.journal.note(sprung=True)
        if self.trap is not None and self.trap.everyone:
            os.killpg(0, number)
        else:
            os.kill(os.getpid(), number)

    def watch_file_system(self) -> None:
        """Put every call that changes a file or folder under observation."""
        # A full disk still renames and deletes.
        self.harmless = {os.replace, os.rename, os.unlink, os.remove, os.rmdir}
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync"):
            setattr(os, name, self._watched(getattr(os, name)))
        write, open_file, open_descriptor = os.write, builtins.open, os.open

        def watched_write(descriptor: int, data: Any) -> int:
            def half() -> None:
                write(descriptor, bytes(data)[: len(data) // 2])
                self.die()

            return self.change(write, descriptor, data, half=half)

        def watched_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set("wax+").isdisjoint(mode):
                return open_file(file, mode, *arguments, **options)
            torn = partial(self._open_torn, file, mode) if mode in ("w", "wb") else None
            return self.change(open_file, file, mode, *arguments, half=torn, **options)

        def watched_open_descriptor(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if not flags & os.O_CREAT:
                return open_descriptor(path, flags, *arguments, **options)
            return self.change(open_descriptor, path, flags, *arguments, **options)

        os.write, os.open = watched_write, watched_open_descriptor
        # pathlib opens through io.
        builtins.open = io.open = watched_open
        self._watch_safetensors()

    def _open_torn(self, file: Any, mode: str) -> Any:
        """A file of which half is written when the process dies."""
        die = self.die

        class Torn(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(bytes(data)[: len(data) // 2])
                die()
                return 0

        binary = io.BufferedWriter(Torn(file, "w"))
        return binary if mode == "wb" else io.TextIOWrapper(binary, encoding="utf-8")

    def _watch_safetensors(self) -> None:
        import safetensors.torch

        serialize = safetensors.torch.serialize_file

        def watched(tensors: Any, filename: Any, *arguments: Any, **options: Any) -> None:
            def half() -> None:
                serialize(tensors, filename, *arguments, **options)
                os.truncate(filename, os.path.getsize(filename) // 2)
                self.die()

            self.change(serialize, tensors, filename, *arguments, half=half, **options)

        safetensors.torch.serialize_file = watched

    def _watched(self, call: Callable) -> Callable:
        return lambda *arguments, **options: self.change(call, *arguments, **options)

    def watch_phases(self) -> None:
        """Note in the journal when the parts of a run begin and end, and what is durable when they end."""
        from engine.reference import store
        from engine.train import checkpoint, optimizer, run, setup

        # What it measures is timing alone, and it takes half of a run's time.
        setup.measure_matmul_rate = lambda device, dtype: 1e12
        # By default only once in 30 s, and these passes take a fraction of one.
        from engine.reference import precompute

        precompute.__kwdefaults__["flush_seconds"] = 0.0
        self._wrap(store, "write_shard", "shard", lambda out, folder, values: {"keys": [k.hex() for k in values]})
        self._wrap(checkpoint, "save_checkpoint", "checkpoint", lambda out, *_, step, **__: {"saved": step})
        self._wrap(optimizer.GuardedUpdate, "step", STEPS, lambda out, *_: {"stepped": True})
        self._wrap(checkpoint, "prune_checkpoints", "prune", None)
        self._wrap(run, "export_model", "export", None)
        self._wrap(run.Run, "_open", "open", None)
        self._wrap(run.Run, "_steps", STEPS, None)
        self._wrap(run.Run, "_final_evaluation", "evaluation", None)
        self._watch_peers()

    def _watch_peers(self) -> None:
        from engine import distributed, endings

        # Nobody but the others of two processes waits for it.
        endings._FAREWELL_SECONDS = 1.0
        join = distributed._join

        def joined() -> None:
            join()
            self.journal.note(joined=True)

        distributed._join = joined

    def _wrap(self, owner: Any, name: str, phase: str, durable: Callable[..., dict[str, Any]] | None) -> None:
        inner = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.phase(phase):
                result = inner(*arguments, **options)
                if durable is not None:
                    self.journal.note(**durable(result, *arguments, **options))
                return result

        setattr(owner, name, wrapped)


def run(job: Job) -> int:
    """Run a command as it would run in a process of its own."""
    journal = Journal(job.journal)
    observer = Observer(journal, job.trap, job.slow_seconds)
    descriptor = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(job.environment or {})
    # What a process that does not end is doing is seen by SIGABRT.
    faulthandler.enable()
    observer.watch_phases()
    observer.watch_file_system()
    from engine import cli

    if job.disk_bytes is not None:
        return on_small_disk(Path(job.output).parent / "run", job.disk_bytes, lambda: cli.main(job.arguments))
    if job.powerless:
        give_up_capabilities()
    if job.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_bytes, resource.RLIM_INFINITY))
    try:
        return cli.main(job.arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


NO_SMALL_DISK = 71
"""Exit code of a child whose system does not let it mount a disk."""


def on_small_disk(folder: Path, size: int, body: Callable[[], int]) -> int:
    """Run ``body`` with ``folder`` on a file system in memory of ``size`` bytes that only this process sees."""
    kept = folder.with_name("kept")
    folder.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, 0x4000 | 0x40000
    if libc.unshare(new_mounts) or libc.mount(None, b"/", None, private, None):
        return NO_SMALL_DISK
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
        return NO_SMALL_DISK
    code = body()
    shutil.copytree(folder, kept)
    if libc.umount2(str(folder).encode(), 2):
        return NO_SMALL_DISK
    os.rmdir(folder)
    os.rename(kept, folder)
    return code


def give_up_capabilities() -> None:
    """Make this process, root or not, obey the permissions of files."""
    version, sets = _NO_CAPABILITIES
    header, data = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)(*sets)
    if ctypes.CDLL(None, use_errno=True).capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def import_everything() -> None:
    """What a run imports late, too. No thread may be started: only the one that forks lives on in a child."""
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.bloom.modeling_bloom
    import transformers.models.lfm2.modeling_lfm2
    import transformers.models.llama.modeling_llama  # noqa: F401

    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401
    import engine.cli
    import engine.commands
    import engine.reference
    import engine.train.loop  # noqa: F401


def serve() -> None:
    """Fork a child for every job on stdin and answer with its process id; answer ``wait PID`` with its exit code."""
    import torch

    torch.set_num_threads(1)
    import_everything()
    # What is imported stays: no child looks through it again for what it could free.
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("wait "):
            _, status = os.waitpid(int(line.split()[1]), 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        job = Job.decode(line)
        child = os.fork()
        if child == 0:
            live(job)
        if job.environment is not None:
            os.setpgid(child, job.leader or child)
        print(child, flush=True)


def live(job: Job) -> NoReturn:
    """The life of a child."""
    code = 70
    try:
        if job.environment is not None:
            os.setpgid(0, job.leader)
        code = run(job)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if job.environment is not None:
        # As any process does: threads of a process group may abort an interpreter that ends.
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    serve()
