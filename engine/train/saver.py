"""When checkpoints are written: while training waits, or beside the steps that follow.

Beside them the state is copied into host memory, which training waits for, and a thread writes the copy, adds checksums
and gives the folder its name. One checkpoint is written at a time: the next one waits for it, as does the end of the
run. Processes of a run speak about it over connections of their own, since their order of messages is another one.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from . import checkpoint as checkpoints
from .checkpoint import Content, Saved

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
        """Wait until the state is copied, before it changes.

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
    """Copies the state into host memory; on CUDA into page-locked memory, on a stream of its own, in a thread."""

    def __init__(self, device: torch.device):
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = device.type == "cuda"
        self._device = device
        self._copying: Future | None = None
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=cuda,
                use_non_blocking_copy=cuda,
            )
        )

    def copy(self, content: Content) -> Any:
        """A function that waits for a copy of ``content`` and returns it."""
        if self._device.type == "cuda":
            # The stream of the copies does not wait for that of the steps.
            torch.cuda.current_stream().synchronize()
        found = self._stager.stage(content.tensors)
        if not isinstance(found, Future):
            return lambda: content._replace(tensors=found)
        self._copying = found
        return lambda: content._replace(tensors=found.result())

    def wait(self) -> None:
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.result()

    def close(self) -> None:
        # What copying failed by, writing has failed by.
        self._copying = None
        self._stager.close()
