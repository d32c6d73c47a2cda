"""Two processes of a test, which talk over a free port of this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def results_of_two(worker: Callable[[int, int, str], None], folder: Path) -> list[Any]:
    """What ``worker(rank, port, folder)`` of each of two processes saved as ``rank<rank>.pt`` in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
