"""The folder of a run, ``train.output_dir``: what its files are called, who holds it, and how they are read."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .durable import disk_errors
from .errors import UserError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
DATA_FILE = "data.json"
"""Lint, plan and token counts of the training data."""
EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "samples.jsonl"
"""Answers to held-out prompts: one JSON object each, with step, row, prompt and answers."""
DETAILS_FILE = "evaluation_details.json"
"""What `dpo evaluate` finds that is more than a number: calibration, flipped rankings, the rows that lost most."""
CARD_FILE = "README.md"
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors.index.json", "*.bin.index.json"),
    *("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin"),
    *("tokenizer*", "chat_template.*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
"""Patterns of files that loaders take for parts of a model: none of an earlier one may stay beside the new one."""
TENSORBOARD_FOLDER = "tensorboard"
REPORT_PAGE = Path("report", "index.html")

AS_TRAINED = "eval_as_trained/"
"""Prefix of the evaluation of weights before they were rounded to what is written."""
SAMPLED = "sampled/"
"""Begins the figures of answers that the model drew, behind the prefix of an evaluation set."""
BY_LENGTH = "eval_accuracies_by_length/"
PAIRS_BY_LENGTH = "eval_num_pairs/"
TRAIN_SOURCE, EVAL_SOURCE = "train/", "eval/"
"""Prefixes of the metrics of one set of a mixture, whose label follows."""
_BY_LENGTH = re.compile(r"eval_(?:(?P<set>.+)_)?(?:accuracies_by_length|num_pairs)/(?P<tokens>.+)")
EXPERTS = "experts/"
EXPERT_LAYER = f"{EXPERTS}layer_"
"""Prefix of the load of experts in single layers."""


def of_sources(prefix: str, values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of each set of a mixture, by label and then by their own name.

    Args:
        prefix: ``TRAIN_SOURCE`` or ``EVAL_SOURCE``.
    """
    found: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        if key.startswith(prefix):
            label, _, name = key.removeprefix(prefix).partition("/")
            found.setdefault(label, {})[name] = value
    return found


def tracker_id_file(folder: Path, tracker: str) -> Path:
    """Where the id of a run at a tracking service is kept, for a resume to go on with it."""
    return folder / f"{tracker}_run_id.txt"


def tokens_of(metric: str) -> str | None:
    """The range of lengths that a metric of an evaluation, of one of several sets or not, holds for; None for all."""
    found = _BY_LENGTH.fullmatch(metric)
    return found and found["tokens"]


def eval_prefixes(metrics: Iterable[str]) -> list[str]:
    """What the metrics of each evaluation set begin with: ``eval_`` alone, or ``eval_NAME_`` for each of several."""
    mark = "rewards/accuracies"
    found = (name.removesuffix(mark) for name in metrics if name.startswith("eval_") and name.endswith(mark))
    return [prefix for prefix in dict.fromkeys(found) if "/" not in prefix]


def bin_words(record: Mapping[str, float | None]) -> str:
    """The bounds of a bin in ``DETAILS_FILE``, where None is no bound."""
    low, high = (None if record.get(edge) is None else f"{record[edge]:g}" for edge in ("from", "to"))
    return f"{low} to {high}" if low and high else f"below {high}" if high else f"above {low}"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` where it is absent and hold it for this process; one that was created and stays empty goes.

    Raises:
        UserError: it cannot be created or written, or another process holds it.
    """
    existed = folder.exists()
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise UserError(f"cannot create train.output_dir={folder}: {error.strerror}; choose another") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    try:
        with only_writer(folder):
            yield
    finally:
        if not existed:
            # Fails, as it should, for a folder that holds anything.
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the system lets go when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another training process: wait for it, stop it, or choose another "
                "train.output_dir"
            ) from error
        except OSError as error:
            # Some network file systems have no locks; training there is as it was without one.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        yield
    finally:
        os.close(descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` in the order of the file. ``step`` of each is an int; what was not finite, for
    which JSON has null, is not a number.

    A last line without its end is left out: a run is writing it, or was killed while it did.

    Raises:
        UserError: another line cannot be read, or has no step.
    """
    return [with_nan(row) for row in _read_lines(path)]


def with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a file of JSON, as the numbers that they were."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        row = _json_object(line)
        if row is not None and _is_count(row.get("step")):
            rows.append({**row, "step": int(row["step"])})
        elif number < len(lines) or line.endswith("\n"):
            raise UserError(f"{path} line {number} is damaged: repair or remove the line")
    return rows


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The records of ``samples.jsonl`` of a run; none where it drew none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SAMPLES_FILE
    return _read_lines(path) if path.exists() else []


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_record(path: Path) -> dict[str, Any]:
    """The object in ``data.json`` or ``evaluation.json``; empty where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} is not JSON ({error.msg}): delete the file or restore it"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where an object is expected: delete or restore it")
    return content


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The sections of ``config.yaml`` as plain values, unchecked; empty where there is none.

    Raises:
        UserError: the file is not YAML.
    """
    import yaml

    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML ({problem}): restore the resolved configuration of the run") from error
    if not isinstance(content, dict):
        return {}
    return {str(name): section for name, section in content.items() if isinstance(section, dict)}
