"""Several ranks in one process: threads whose collectives wait for each other, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from engine import distributed, mesh

T = TypeVar("T")


class Ranks:
    """``size`` ranks that work on one pack, and hold one copy of the model each."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch):
        self.size = size
        self._barrier = threading.Barrier(size)
        self._local = threading.local()
        self._given: dict[int, torch.Tensor] = {}
        for module, name, stand_in in (
            (distributed, "size", lambda: size),
            (mesh, "context_size", lambda: size),
            (mesh, "context_rank", lambda: self._local.rank),
            (mesh, "context_group", lambda: None),
            (mesh, "shards", lambda: 1),
            (torch.distributed, "all_to_all_single", self._all_to_all),
            (torch.distributed, "all_gather", self._all_gather),
        ):
            monkeypatch.setattr(module, name, stand_in)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What ``work`` returns on each rank."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def start(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [results[rank] for rank in range(self.size)]

    def _exchange(self, own: torch.Tensor) -> list[torch.Tensor]:
        self._barrier.wait()
        self._given[self._local.rank] = own.detach().clone()
        self._barrier.wait()
        return [self._given[rank] for rank in range(self.size)]

    def _all_to_all(self, output: torch.Tensor, own: torch.Tensor, group: Any = None) -> None:
        received = torch.stack([part[self._local.rank] for part in self._exchange(own)])
        output.copy_(received)

    def _all_gather(self, outputs: list[torch.Tensor], own: torch.Tensor, group: Any = None) -> None:
        for output, part in zip(outputs, self._exchange(own), strict=True):
            output.copy_(part)
