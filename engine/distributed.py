"""Several processes that work on one run: who am I, what do the others have, and how do we end together.

``torchrun`` starts the processes and sets ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. In one process every function
here is a no-op that needs no process group, so callers never ask which case they are in.

Sums over ranks are formed in the order of the ranks on every rank, so that all ranks hold the same bits and take the
same decisions.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .endings import Ear, end_of_run
from .endings import PeerFailure as PeerFailure
from .endings import lost_connection as lost_connection
from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")

log = logging.getLogger(__name__)


class _Group:
    """What is known of the processes of the run."""

    def __init__(self) -> None:
        self.places: list[str] = []
        """Machine and process id of each rank."""
        self.minutes = 30.0
        """How long one process waits for another."""
        self.announced: set[str] = set()
        self.left_out = False
        self.store: Store | None = None
        """Where processes agree on who speaks at the end."""
        self.ear: Ear | None = None


_group = _Group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: for work of its own, which the others do not know of."""
    before, _group.left_out = _group.left_out, True
    try:
        yield
    finally:
        _group.left_out = before


def launched_size() -> int:
    """Processes that the launcher started, known before the process group is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def size() -> int:
    """Processes of the run."""
    if launched_size() == 1 or _group.left_out:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """0-based number of this process."""
    if size() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def say(text: str) -> None:
    """Print ``text`` once for all processes."""
    if is_main():
        print(text, flush=True)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that the launcher started; a no-op for one process, or within another ``process_group``.

    gloo carries CPU tensors and objects, nccl those of CUDA devices. When a process fails, or was asked to end, all
    do: the first one raises its own error, the others ``PeerFailure`` with its exit code.

    Raises:
        UserError: the launcher's variables are missing or wrong, or a process ended without a word.
    """
    if launched_size() > 1:
        # Where a process is lost, torch warns of each use of its connections by a page of frames. Read on import.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if launched_size() == 1 or size() > 1:
        yield
        return
    import torch.distributed as dist

    ear = None
    try:
        # Inside, since a request may come as soon as the others count on this process.
        _join()
        assert _group.store is not None
        ear = _group.ear = Ear(_group.store)
        with ear:
            _group.places = gather(f"process {os.getpid()} on {socket.gethostname()}")
            yield
            # Inside, since others may fail while this process waits for them.
            barrier()
    except BaseException as error:
        if _group.store is None or not dist.is_initialized():
            raise
        ear = ear or Ear(_group.store)
        end = end_of_run(error, _group.store, ear, places=_group.places, minutes=_group.minutes)
        if end is error:
            raise
        raise end from error
    # Sharded modules hold the groups in cycles. Freed when the interpreter ends, their threads abort the process.
    gc.collect()
    dist.destroy_process_group()


def take_leave(code: int, speak: Callable[[], None]) -> None:
    """Let the other processes end with the exit code ``code`` as soon as this one does, whose main thread is stuck.

    Args:
        speak: says why; called unless another process has ended first.
    """
    if size() == 1 or _group.ear is None:
        speak()
    else:
        _group.ear.claim(code, speak)


def leave(code: int) -> NoReturn:
    """End this process with ``code``.

    One of several ends without tearing the interpreter down: threads of its connections may be alive, which the end of
    the interpreter would make abort the process.
    """
    if launched_size() == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _join() -> None:
    import torch
    import torch.distributed as dist

    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in needed if name not in os.environ]
    if absent:
        raise UserError(
            f"WORLD_SIZE is {launched_size()} but {', '.join(absent)} is not set: start several processes with "
            "torchrun, or unset WORLD_SIZE"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise UserError(
                f"process {local} of this machine has no GPU, there are {devices}: "
                f"set torchrun --nproc-per-node {devices}"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store, number, count = next(iter(dist.rendezvous("env://")))
    _group.store = dist.PrefixStore("end", store)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=number, world_size=count)


def barrier(group: Any = None) -> None:
    """Wait until every process is here.

    Args:
        group: of ``new_group``, for a thread that must not speak in between what others say.
    """
    if size() > 1:
        gather(None, group)


def new_group() -> Any:
    """All processes, on further connections for the CPU; None for one process. Every rank must call it."""
    if size() == 1:
        return None
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(minutes=_group.minutes))


def set_timeout(minutes: float) -> None:
    """Let processes wait that long for each other from now on; before, half an hour."""
    _group.minutes = minutes
    if launched_size() > 1 and size() > 1:
        from torch.distributed.distributed_c10d import _set_pg_timeout

        _set_pg_timeout(timedelta(minutes=minutes))


def announce(work: str) -> None:
    """Say, once, that rank 0 does something long that the others wait for, such as ``reads the model``."""
    if size() > 1 and work not in _group.announced:
        _group.announced.add(work)
        log.info(
            "the first process %s; the others wait, at most %g minutes (train.timeout_minutes)", work, _group.minutes
        )


def broadcast(value: T) -> T:
    """What rank 0 passes, on every rank; pickled."""
    import torch.distributed as dist

    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_bytes(tensor: Tensor) -> None:
    """Overwrite a contiguous tensor, of any dtype and the same shape on every rank, with that of rank 0."""
    import torch
    import torch.distributed as dist

    if size() > 1 and tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)


def gather(value: T, group: Any = None) -> list[T]:
    """What every rank passes, in the order of the ranks; pickled."""
    import torch.distributed as dist

    if size() == 1:
        return [value]
    values: list = [None] * size()
    dist.all_gather_object(values, value, group=group)
    return values


def each_rank(values: Tensor) -> list[Tensor]:
    """A tensor of the same shape of every rank, in the order of the ranks. Does not wait for a CUDA device."""
    import torch
    import torch.distributed as dist

    if size() == 1:
        return [values]
    parts = [torch.empty_like(values) for _ in range(size())]
    dist.all_gather(parts, values.contiguous())
    return parts


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor of the same shape on every rank. Does not wait for a CUDA device."""
    import torch

    return values if size() == 1 else torch.stack(each_rank(values)).sum(0)


def concat_over_ranks(rows: Tensor) -> list[Tensor]:
    """The rows of every rank, in the order of the ranks.

    Args:
        rows: [R, ...]; R may differ between ranks.
    """
    import torch
    import torch.distributed as dist

    if size() == 1:
        return [rows]
    counts = gather(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


@contextmanager
def local_main_first(name: str) -> Iterator[None]:
    """Let one process of each machine load ``name`` first when it is on the Hub, so that it is downloaded once."""
    waits = size() > 1 and not os.path.exists(os.path.expanduser(name))
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if waits and not first:
        barrier()
    yield
    if waits and first:
        barrier()


@contextmanager
def machine_first(work: str) -> Iterator[None]:
    """Let one process of each machine go first, whose ``work`` the others find done; when it fails, they do not start.

    Every rank must call it.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if size() > 1:
        announce(work)
    if not first:
        barrier()
    yield
    if first:
        barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 go first; when it fails, the others do not start."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank must ask for the same one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded; a view."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def flat_offset(tensor: Tensor) -> int:
    """Where what this rank holds of a tensor begins in all of it, in elements; it is sharded by its rows, if at all."""
    if not hasattr(tensor, "device_mesh"):
        return 0
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert not any(offsets[1:])
    return offsets[0] * math.prod(tensor.shape[1:])


def copy_full(target: Tensor, source: Tensor) -> None:
    """Copy all of ``source`` into ``target``, which may be sharded; every rank passes the same source."""
    import torch

    with torch.no_grad():
        if not hasattr(target, "device_mesh"):
            target.copy_(source)
            return
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        own = source.to(target.device)
        target.copy_(distribute_tensor(own, target.device_mesh, target.placements, src_data_rank=None))
