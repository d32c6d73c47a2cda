"""Starting processes as torchrun does, without its agent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 900
"""A guard against processes that hang, far above what a busy machine takes."""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def launch(commands: Sequence[Sequence[str]]) -> list[Ended]:
    """Run one command per rank, together, and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, command in enumerate(commands):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(commands), "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in variables.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


def run_jobs(folder: Path, ranks: int, jobs: list[dict]) -> list[Ended]:
    """Run jobs of ``tests.engine.distributed.worker`` in one process group."""
    path = folder / f"jobs-{ranks}-{len(list(folder.glob('jobs-*')))}.json"
    path.write_text(json.dumps(jobs))
    return launch([["-m", "tests.engine.distributed.worker", str(path)]] * ranks)
