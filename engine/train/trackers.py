"""Where the metrics of a run go on this machine: ``metrics.jsonl``, TensorBoard files, functions of the user's own."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from .. import distributed
from ..config.schema import TrainConfig
from ..durable import disk_errors, write_atomically
from ..errors import UserError
from ..plain_json import to_json
from ..run_folder import AS_TRAINED, METRICS_FILE, TENSORBOARD_FOLDER, read_metrics
from .samples import Sample, as_markdown
from .services import SERVICES, check_wandb_login, open_service


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        """Answers of all steps until this one, those of one prompt beside each other."""

    def flush(self) -> None:
        """Make durable what was logged: a resume from a checkpoint written after this logs none of it again."""

    def close(self) -> None: ...


Callback = Callable[[int, Mapping[str, float]], None]
"""Is told of every row of metrics as it is written: the step and the values."""


class CallbackTracker:
    """A function of the user's own."""

    def __init__(self, callback: Callback):
        self.callback = callback

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.callback(step, dict(values))

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing: it is told of numbers."""

    def flush(self) -> None:
        """Nothing: what it keeps is its own."""

    def close(self) -> None:
        """Nothing: it is not ours."""


class JsonlTracker:
    """``metrics.jsonl``: one JSON object a line, written at once."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / METRICS_FILE
        with disk_errors(self.path):
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with disk_errors(self.path):
            self._file.write(to_json(dict(values)) + "\n")
            self._file.flush()

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing: they have a file of their own."""

    def flush(self) -> None:
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with disk_errors(self.path):
            self._file.close()


class TensorBoardTracker:
    """Event files below ``tensorboard/``; after a resume, events past the checkpoint are hidden."""

    def __init__(self, output_dir: Path, *, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = output_dir / TENSORBOARD_FOLDER
        self._excepthook = threading.excepthook
        threading.excepthook = self._on_thread_error
        with disk_errors(self.path):
            self._writer = SummaryWriter(str(self.path), purge_step=first_step or None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with disk_errors(self.path):
            for name, value in values.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        with disk_errors(self.path):
            for sample in samples:
                if sample["step"] == step:
                    # One tag for each prompt: TensorBoard lists the steps of a tag below each other.
                    self._writer.add_text(f"samples/row {sample['row']}", as_markdown([sample]), step)

    def flush(self) -> None:
        with disk_errors(self.path):
            self._writer.flush()

    def close(self) -> None:
        threading.excepthook = self._excepthook
        with disk_errors(self.path):
            self._writer.close()

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        # The thread that writes hands a full disk to the next call here; its traceback would be printed besides.
        if not (isinstance(error.exc_value, OSError) and type(error.thread).__name__ == "_AsyncWriterThread"):
            self._excepthook(error)


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise a ``UserError`` when a tracker is not installed or has no login, before anything is computed."""
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.report_to {name} needs {name}: pip install {name}, or take it out of train.report_to"
            )
    if "wandb" in report_to and distributed.is_main():
        check_wandb_login()


def open_trackers(output_dir: Path, train: TrainConfig, *, first_step: int) -> list[Tracker]:
    """``metrics.jsonl`` always, then those that the configuration names.

    Raises:
        UserError: one of them does not start.
    """
    trackers: list[Tracker] = [JsonlTracker(output_dir)]
    if "tensorboard" in train.report_to:
        trackers.append(TensorBoardTracker(output_dir, first_step=first_step))
    return trackers + [open_service(name, output_dir, train) for name in train.report_to if name in SERVICES]


def keep_rows_until(output_dir: Path, step: int, *, evaluated_at: int) -> None:
    """Drop the rows of ``metrics.jsonl`` past ``step``, and a line that a killed process left half-written.

    Args:
        evaluated_at: last step whose evaluation is known; rows of later ones go, since the evaluation is made again.
    """
    path = output_dir / METRICS_FILE
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= (step if "loss" in row else evaluated_at)]
        # That of rounded weights is made again, too: no checkpoint knows it.
        kept = [row for row in kept if not any(name.startswith(AS_TRAINED) for name in row)]
        write_atomically(path, "".join(to_json(row) + "\n" for row in kept))
