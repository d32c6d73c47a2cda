"""When checkpoints are written: while training waits, or beside the steps that follow.

Beside them the state is copied into host memory, which training waits for, and a thread writes the copy, adds checksums
and gives the folder its name. One checkpoint is written at a time: the next one waits for it, as does the end of the
run. Processes of a run speak about it over connections of their own, since their order of messages is another one.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from . import checkpoint as checkpoints
from .checkpoint import Content, Saved
from .host_memory import to_host

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run. Every rank must call its methods.

    Args:
        limit: ``train.save_total_limit``.
        beside: whether they are written beside the steps.
        device: that the state is on.
    """

    def __init__(self, output_dir: Path, limit: int | None, *, beside: bool, device: torch.device):
        self._output_dir = output_dir
        self._limit = limit
        self._stager = _Stager(device) if beside else None
        self._group = distributed.new_group() if beside else None
        self._writer: _Writer | None = None
        self._tokenizer: _TokenizerFiles | None = None

    def save(
        self, saved: Saved, *, step: int, state: dict[str, Any], best: Path | None = None, stopped: bool = False
    ) -> None:
        """Write the checkpoint of a step, and delete those that need not stay when it is durable.

        Args:
            state: JSON values that come back from ``read_state``.
            best: a checkpoint that stays.
            stopped: see ``save_checkpoint``; the write is awaited.

        Raises:
            UserError: this checkpoint, or the one before, could not be written.
        """
        self.finish()
        content = checkpoints.collect(saved, step=step, state=state)

        def write(content: Content) -> Path:
            path = checkpoints.save_checkpoint(
                self._output_dir, saved, content, step=step, stopped=stopped, group=self._group
            )
            if distributed.is_main():
                self.prune(best)
            return path

        if self._stager is None or stopped:
            log.info("checkpoint written to %s", write(content))
            return
        self._tokenizer = self._tokenizer or _TokenizerFiles(saved.tokenizer)
        saved = saved._replace(tokenizer=self._tokenizer)
        copied = self._stager.copy(content)
        self._writer = _Writer(lambda: write(copied()))
        self._writer.start()

    def prune(self, best: Path | None) -> None:
        """Delete the checkpoints that need not stay, the newest of which is durable."""
        checkpoints.prune_checkpoints(self._output_dir, self._limit, best=best)

    def before_update(self) -> None:
        """Have the update that comes wait until the state is copied.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        if self._stager is not None:
            self._stager.wait()
        if self._writer is not None and not self._writer.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: it could not be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.join()
            if writer.error is not None:
                raise writer.error
            log.info("checkpoint written to %s", writer.path)

    def close(self) -> None:
        """Wait for the checkpoint that is being written where the run ends by another error, and free the copy."""
        try:
            self.finish()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("the checkpoint that was being written is not there: %s", reason)
        if self._stager is not None:
            self._stager.close()


class _TokenizerFiles:
    """The files of a tokenizer, which the steps may use while they are written: it takes one thread at a time."""

    def __init__(self, tokenizer: Any):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            self._files = {path.relative_to(folder): path.read_bytes() for path in paths}

    def save_pretrained(self, folder: Path) -> None:
        for name, content in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


class _Writer(threading.Thread):
    """Writes one checkpoint."""

    def __init__(self, write: Any):
        # A process that must end at once does not wait for it; what it leaves has no name.
        super().__init__(name="checkpoint", daemon=True)
        self._write = write
        self.path: Path | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.path = self._write()
        except BaseException as error:
            self.error = error


class _Stager:
    """Copies the state into host memory, where each tensor has its place; on CUDA beside the steps, on a stream."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[tuple[str, str], Tensor] = {}
        self._copied: Any = None
        """The event that the last copy ends with, until an update has waited for it."""
        self._sources: Content | None = None

    def copy(self, content: Content) -> Callable[[], Content]:
        """A function that waits for a copy of ``content`` and returns it."""
        if self._stream is None:
            copy = self._copy(content)
            return lambda: copy
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy = self._copy(content)
        copied = self._stream.record_event()
        # some tensors may be nobody else's, and would make room for others while they are read
        self._copied, self._sources = copied, content

        def wait() -> Content:
            # the thread that writes has no device yet, and would take the first one
            with torch.cuda.device(self._device):
                copied.synchronize()
            return copy

        return wait

    def _copy(self, content: Content) -> Content:
        made: dict[Any, Tensor] = {}
        tensors: dict[str, dict[str, Tensor]] = {}
        for part, named in content.tensors.items():
            tensors[part] = {}
            for name, tensor in named.items():
                # tied weights are one, as they are in the model
                local = distributed.local_tensor(tensor)
                key = (local.data_ptr(), local.dtype, local.shape, local.stride()) if local.numel() else (part, name)
                if key not in made:
                    made[key] = to_host(tensor, self._places.get((part, name)))
                    self._places[part, name] = made[key]
                tensors[part][name] = made[key]
        return content._replace(tensors=tensors)

    def wait(self) -> None:
        """Let the device change the state only when it is copied. The host goes on."""
        copied, self._copied = self._copied, None
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
            self._sources = None

    def close(self) -> None:
        """Free the copy, when nobody writes it any more."""
        self._places.clear()
        self._sources = None
