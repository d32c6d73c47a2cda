"""Which rows of which step were not finite: what is kept of the steps until they are known to be."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..config.schema import RunConfig
from .checkpoint import complete_checkpoints
from .feed import TrainingStep
from .scored import Scored

_ROWS_NAMED = 8


class _Step(NamedTuple):
    step: int
    rows: list[int | str]
    values_G: list[Tensor]
    loss: Tensor
    grad_norm: Tensor


class Evidence:
    """Numbers of the steps since the last that was known to be finite, on the device."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def add(self, step: TrainingStep, scored: Scored, loss: Tensor, grad_norm: Tensor) -> None:
        logps = [scored.chosen_logps, scored.rejected_logps]
        self._steps.append(_Step(step.number, step.rows, logps, loss, grad_norm))

    def clear(self) -> None:
        self._steps.clear()

    def explain(self, config: RunConfig) -> str:
        """What was not finite in the first step that failed, and what to do. Every rank must call this."""
        failed = [not all(t.isfinite().all() for t in (*e.values_G, e.loss, e.grad_norm)) for e in self._steps]
        bad = self._steps[min(found.index(True) for found in distributed.gather(failed) if any(found))]
        finite_G = torch.stack([t.isfinite() for t in bad.values_G]).all(0).tolist()
        own = [row for row, finite in zip(bad.rows, finite_G, strict=True) if not finite]
        culprits = sorted(chain.from_iterable(distributed.gather(own)))
        what = "log-probs are" if culprits else "the loss or a gradient is"
        rows = sorted(set(culprits or chain.from_iterable(distributed.gather(bad.rows))))
        named = ", ".join(map(str, rows[:_ROWS_NAMED])) + (f" and {len(rows) - _ROWS_NAMED} more" if rows[8:] else "")
        saved = complete_checkpoints(Path(config.train.output_dir))
        wider = ", with model.dtype=float32, or" if config.model.dtype != "float32" else ", or"
        kept = f"the last checkpoint is {saved[-1][1]}" if saved else "no checkpoint was due yet"
        return (
            f"step {bad.step}: {what} not finite, rows {named}; the step was not applied and {kept}: "
            f"start a new run with a lower optim.learning_rate{wider} without these rows"
        )
