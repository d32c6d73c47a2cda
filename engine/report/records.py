"""What a run folder holds, read for the report: metrics, data, configuration, evaluation.

Every file but ``metrics.jsonl`` may be missing, and the run may still be going: its last line may be half written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..train.durable import is_complete


@dataclass(frozen=True)
class Series:
    """The values of one metric over optimizer steps."""

    steps: np.ndarray
    """float64 [n], ascending."""
    values: np.ndarray
    """float64 [n]; nan where the run logged a non-finite number."""

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> np.ndarray:
        """The values that are numbers, float64."""
        return self.values[np.isfinite(self.values)]

    @property
    def last(self) -> float | None:
        return float(self.finite[-1]) if len(self.finite) else None


@dataclass(frozen=True)
class RunRecords:
    """A run folder in memory."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    """The lines of ``metrics.jsonl``, by ascending step."""
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    """Whether the final model has been written, whole."""

    def series(self, name: str) -> Series | None:
        """The metric ``name`` over steps, or None when no row has it."""
        points = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        if not points:
            return None
        steps, values = np.asarray(points, dtype=np.float64).T
        return Series(steps, np.where(np.isfinite(values), values, np.nan))

    @property
    def first_step(self) -> int:
        return int(self.rows[0]["step"])

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(folder: Path) -> RunRecords:
    """Read a run folder. Raises UserError when it is no run folder or a file in it is damaged."""
    if not folder.is_dir():
        raise UserError(f"no run folder at {folder}: give the output_dir of a training run")
    return RunRecords(
        folder=folder,
        rows=_read_metrics(folder / "metrics.jsonl"),
        config=_read_config(folder / "config.yaml"),
        data=_read_json(folder / "data.json"),
        evaluation=_read_json(folder / "evaluation.json"),
        finished=is_complete(folder),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: {path.parent} is not the folder of a training run that has started")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows: dict[tuple[float, bool], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            # A running or killed process leaves at most its last line unfinished.
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{path} line {number} is not JSON ({error.msg}): remove the line") from error
        if not isinstance(row, dict) or not _is_number(row.get("step")) or not math.isfinite(row["step"]):
            raise UserError(f"{path} line {number} has no numeric field 'step': remove the line")
        # A resumed run repeats the steps after its checkpoint; the later line is the one that counts.
        rows[row["step"], any(key.startswith("eval_") for key in row)] = row
    if not rows:
        raise UserError(f"{path} holds no complete line yet: wait until the run has logged its first step")
    return [rows[key] for key in sorted(rows)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} is not JSON ({error.msg}): delete the file or restore it"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where an object is expected: delete or restore it")
    return content


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    import yaml

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
