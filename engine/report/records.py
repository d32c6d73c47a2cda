"""What a run folder holds, read for the report: metrics, data, configuration, evaluation.

Every file but ``metrics.jsonl`` may be missing, and the run may still be going: its last line may be half written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config.losses import REFERENCE_FREE_LOSSES, UNPAIRED_LOSSES
from ..durable import is_complete
from ..errors import UserError
from ..run_folder import (
    DATA_FILE,
    DETAILS_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    eval_prefixes,
    read_metrics,
    read_record,
    read_samples,
    read_settings,
)


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
    details: Mapping[str, Any] = field(default_factory=dict)
    """What ``dpo evaluate`` left beside its numbers, by evaluation set."""
    samples: Sequence[Mapping[str, Any]] = ()
    """The lines of ``samples.jsonl``, by ascending step."""
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
    def eval_sets(self) -> dict[str, str]:
        """What the metrics of each evaluation set begin with, and what it is called: ``held-out``, or its name."""
        prefixes = eval_prefixes(name for row in (*self.rows, self.evaluation) for name in row) or ["eval_"]
        return {prefix: prefix.removeprefix("eval_").removesuffix("_") or "held-out" for prefix in prefixes}

    @property
    def loss_types(self) -> list[str]:
        """The names of the losses that the run adds up."""
        found = self.config.get("loss", {}).get("loss_type", "sigmoid")
        return [str(name) for name in found] if isinstance(found, list) else [str(found)]

    @property
    def has_reference(self) -> bool:
        """Whether rewards are differences from a reference model."""
        return not REFERENCE_FREE_LOSSES.issuperset(self.loss_types)

    @property
    def unit(self) -> str:
        """What losses and accuracies are means over: ``pairs``, or ``rows`` that are each desirable or not."""
        return "pairs" if UNPAIRED_LOSSES.isdisjoint(self.loss_types) else "rows"

    @property
    def seconds(self) -> float | None:
        """Seconds that steps took, by the tokens and the speed of each logged interval; None where no row has them."""
        total, before = 0.0, 0.0
        for row in self.rows:
            tokens, speed = row.get("num_tokens"), row.get("perf/tokens_per_second")
            if isinstance(tokens, int | float) and isinstance(speed, int | float) and speed > 0:
                total, before = total + max(tokens - before, 0) / speed, float(tokens)
        return total or None

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
        rows=_read_metrics(folder / METRICS_FILE),
        config=read_settings(folder),
        data=read_record(folder / DATA_FILE),
        evaluation=read_record(folder / EVALUATION_FILE),
        details=read_record(folder / DETAILS_FILE),
        samples=read_samples(folder),
        finished=is_complete(folder),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: {path.parent} is not the folder of a training run that has started")
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in read_metrics(path):
        # A resumed run repeats the steps after its checkpoint; the later line is the one that counts.
        rows[row["step"], any(key.startswith("eval_") for key in row)] = row
    if not rows:
        raise UserError(f"{path} holds no complete line yet: wait until the run has logged its first step")
    return [rows[key] for key in sorted(rows)]
