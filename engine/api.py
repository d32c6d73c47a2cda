"""The engine from Python: what the commands do, as functions of a configuration.

    from dpo_engine.api import build_config, load_run, train

    config = build_config({"model": {"model_name_or_path": "..."}, "data": {"dataset_name": "pairs.jsonl"}})
    result = train(config, callbacks=[lambda step, values: print(step, values.get("loss", values.get("eval_loss")))])
    run = load_run(result.output_dir)

Wrong settings raise ``UserError``, whose text is the line that a command prints. Progress goes to the logger
``dpo_engine``: ``logging.basicConfig(level="INFO", format="%(message)s")`` shows it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import load_config
from .config.load import build_config as _build_config
from .config.schema import RunConfig
from .errors import UserError
from .evaluate import evaluate as _evaluate
from .precompute import check_settings, fill_store
from .run_folder import CONFIG_FILE, EVALUATION_FILE, METRICS_FILE, read_metrics, read_record, with_nan
from .train.loop import train as _train
from .train.resume import TrainResult
from .train.trackers import Callback

__all__ = [
    "Callback",
    "Run",
    "RunConfig",
    "TrainResult",
    "UserError",
    "build_config",
    "evaluate",
    "load_config",
    "load_run",
    "precompute",
    "train",
]


class Run(NamedTuple):
    """What a run folder holds."""

    folder: Path
    """Also the model: ``AutoModelForCausalLM.from_pretrained(run.folder)``, or an adapter that peft loads."""
    config: RunConfig
    metrics: list[dict[str, Any]]
    """The rows of ``metrics.jsonl``, oldest first: training and, under ``eval_`` names, evaluation."""
    evaluation: dict[str, float] | None
    """The last one, accuracies by length included; None when there was none."""


def build_config(sections: Mapping[str, Any]) -> RunConfig:
    """A configuration from the sections of a run file as dictionaries, checked as a file is.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or a missing required key.
    """
    wrong = next((name for name, section in sections.items() if not isinstance(section, Mapping | None)), None)
    if wrong is not None:
        raise UserError(
            f"the configuration: {wrong} must be a section such as {{'loss': {{'beta': 0.1}}}}, got {sections[wrong]!r}"
        )
    return _build_config({name: dict(section or {}) for name, section in sections.items()}, "the configuration")


def train(config: RunConfig, *, callbacks: Sequence[Callback] = (), resume: bool = False) -> TrainResult:
    """What ``dpo train`` does: see ``dpo_engine.train.loop.train``.

    Args:
        callbacks: each called with the step and the values of every row of metrics as it is written: rows of training,
            which have ``loss``, and rows of evaluations, which have ``eval_loss`` (of several sets, ``eval_NAME_loss``)
            and follow the row of their step.
        resume: go on from the newest complete checkpoint.

    Raises:
        UserError: whatever the user can correct.
        Stopped: the run was asked to end (SIGTERM, Ctrl-C); what is done is in a checkpoint.
    """
    return _train(config, callbacks=callbacks, resume=resume)


def evaluate(
    config: RunConfig, model_path: str | os.PathLike[str] | None = None, *, samples: int = 0
) -> dict[str, float]:
    """What ``dpo evaluate`` does: metrics of a model, by default the one before training, on the evaluation data.

    Args:
        samples: answers to draw to each of ``train.sample_prompts`` prompts, for the KL divergence from the reference.

    Raises:
        UserError: no evaluation data, or a model that cannot be loaded.
    """
    return _evaluate(config, None if model_path is None else os.fspath(model_path), samples=samples)


def precompute(config: RunConfig) -> None:
    """What ``dpo precompute`` does: store the reference log-probs that are missing.

    Raises:
        UserError: whatever the user can correct.
    """
    check_settings(config, None)
    fill_store(config)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read what a run left, finished or not.

    Raises:
        UserError: the folder is not one of a run, or a file of it is damaged.
    """
    path = Path(folder)
    if not (path / CONFIG_FILE).exists():
        raise UserError(
            f"{path} is not the folder of a run: it has no {CONFIG_FILE}; give the train.output_dir of a run"
        )
    metrics = read_metrics(path / METRICS_FILE) if (path / METRICS_FILE).exists() else []
    evaluation = with_nan(read_record(path / EVALUATION_FILE)) if (path / EVALUATION_FILE).exists() else None
    return Run(path, load_config(path / CONFIG_FILE), metrics, evaluation)
