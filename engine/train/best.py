"""Which evaluation of a run is the best so far, and whether the run ends early: as transformers counts both.

An evaluation ends the patience unless it is better than the best before it by more than a threshold; whichever is
better, by however little, is the best from then on. What a checkpoint needs so that a resumed run decides alike is
``state``. The checkpoint to go back to is the best of those: an evaluation without one cannot be gone back to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .. import distributed
from ..config.fields import nearest
from ..config.mixture import labels_of
from ..config.schema import RunConfig
from ..digits import shown_number
from ..errors import UserError
from ..run_folder import EVAL_SOURCE
from .metrics import PREFERENCE_NAMES, TOKEN_NAMES
from .optimizer import METRIC_SCHEDULES

log = logging.getLogger(__name__)

UNPAIRED_NAMES = ("kl", "count/chosen", "count/rejected")
RANKING_NAMES = ("ranking_accuracy", "ranking_accuracy_per_token")


class Kept(NamedTuple):
    """The best evaluation that a checkpoint was written after."""

    step: int
    value: float
    evaluation: dict[str, float]

    @property
    def shown_value(self) -> str:
        """For people."""
        return shown_number(self.value)


class Best:
    """The best evaluation so far, by ``train.metric_for_best_model``."""

    def __init__(self, config: RunConfig):
        train = config.train
        self.metric = train.best_metric or "eval_loss"
        self.keeps = train.load_best_model_at_end
        self.patience = train.early_stopping_patience
        self.threshold = train.early_stopping_threshold
        greater = train.greater_is_better
        self._greater = not self.metric.endswith("loss") if greater is None else greater
        self.value: float | None = None
        self.waited = 0
        """Evaluations in a row that were not better."""
        self.kept: Kept | None = None

    def evaluated(self, evaluation: Mapping[str, float], *, step: int, saved: bool) -> None:
        """Take note of an evaluation. Every rank must call this.

        Args:
            saved: whether a checkpoint is written after it.
        """
        if not self.keeps and self.patience is None:
            return
        # All ranks decide by the same bits.
        value = distributed.broadcast(self.of(evaluation))
        counts = self.value is None or (self._is_better(value, self.value) and abs(value - self.value) > self.threshold)
        self.waited = 0 if counts else self.waited + 1
        if self._is_better(value, self.value):
            self.value = value
        # The run's last step has a checkpoint, too, and early stopping makes it the last.
        saved = saved or self.ends_run
        if saved and self.keeps and self._is_better(value, self.kept and self.kept.value):
            self.kept = Kept(step, value, dict(evaluation))

    def of(self, evaluation: Mapping[str, float]) -> float:
        """The metric in an evaluation."""
        if self.metric not in evaluation:
            raise UserError(
                f"train.metric_for_best_model {self.metric} is not in the evaluation: it has {', '.join(evaluation)}"
            )
        return evaluation[self.metric]

    def _is_better(self, value: float, than: float | None) -> bool:
        if than is None:
            # Not a number is better than nothing to no one.
            return value == value
        return value > than if self._greater else value < than

    @property
    def ends_run(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def words(self) -> str:
        """Why the run ends, for people."""
        best = "no value" if self.value is None else shown_number(self.value)
        by = f" by more than {self.threshold:g}" if self.threshold else ""
        times = "evaluation" if self.waited == 1 else "evaluations in a row"
        return (
            f"early stopping: {self.metric} was not better than {best}{by} in {self.waited} {times} "
            f"(train.early_stopping_patience {self.patience})"
        )

    def state(self) -> dict[str, Any]:
        """JSON values that ``load`` takes."""
        return {"value": self.value, "waited": self.waited, "kept": self.kept and list(self.kept)}

    def load(self, state: Mapping[str, Any], *, evaluated: bool = False) -> None:
        """As it was when a checkpoint was written; nothing is known of an older one.

        Args:
            evaluated: whether the run had been evaluated by then.
        """
        self.value, self.waited = state.get("value"), state.get("waited", 0)
        kept = state.get("kept") if self.keeps else None
        self.kept = Kept(*kept) if kept else None
        if evaluated and self.value is None and (self.keeps or self.patience is not None):
            log.warning(
                "evaluations before this resume were not compared: the best is looked for among those that follow"
            )


def check_metric(config: RunConfig) -> None:
    """Raise a ``UserError`` when the metric that evaluations are compared by is none of theirs.

    A model without experts has no ``aux_loss``, which only its evaluation shows.
    """
    train, data = config.train, config.data
    if train.best_metric is None and not (train.compares or config.optim.lr_scheduler_type in METRIC_SCHEDULES):
        return
    wanted, known = train.best_metric or "eval_loss", list(_names(config))
    if wanted in known or not data.has_evaluation:
        return
    near = nearest(wanted, known)
    advice = f"; did you mean {near}?" if near else ""
    sets = f" of the sets {', '.join(data.eval_splits)}" if len(data.eval_splits) > 1 else ""
    raise UserError(
        f"train.metric_for_best_model: evaluations{sets} have no {wanted}{advice or ';'} they have {', '.join(known)}"
    )


def _names(config: RunConfig) -> Iterator[str]:
    names = (*PREFERENCE_NAMES, *(TOKEN_NAMES if config.train.token_metrics else ()), "aux_loss", *RANKING_NAMES)
    ranking: tuple[str, ...] = RANKING_NAMES
    if config.loss.unpaired:
        names = (*(name for name in names if name not in ranking), *UNPAIRED_NAMES)
        ranking = ()
    for split in config.data.eval_splits:
        yield from (f"{split}_{name}" for name in names)
    for one, label in zip(config.data.datasets, labels_of(config.data.datasets), strict=True):
        if one.eval_split is not None or config.data.eval_fraction is not None:
            yield from (f"{EVAL_SOURCE}{label}/{name}" for name in (*PREFERENCE_NAMES, *ranking[:1]))
