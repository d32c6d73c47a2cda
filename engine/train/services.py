"""Trackers that other packages run: Weights & Biases, MLflow, Trackio, SwanLab.

Each continues its run after a resume, by an id that is kept in the run folder. What one of them raises while the run
goes on is said once and does not end it: ``metrics.jsonl`` has every row.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..config.schema import TrainConfig
from ..durable import write_atomically
from ..errors import UserError
from ..run_folder import read_settings, tracker_id_file
from .samples import Sample, as_markdown, by_prompt

PROJECT = "dpo-kernels"
_FAILURES = 3
"""So many calls that fail in a row, and no more are made: some wait minutes for a server that is gone."""
_SAMPLES = "samples"
_COLUMNS = ("row", "prompt", "step", "most likely", "drawn")
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 500
"""Of MLflow: parameters in one call, and characters of a value that every version takes."""

log = logging.getLogger(__name__)


class Service(Protocol):
    """A run at a service."""

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def show(self, step: int, samples: Sequence[Sample]) -> None: ...

    def close(self) -> None: ...


class _Wandb:
    """A Weights & Biases run."""

    def __init__(self, folder: Path, project: str, name: str, known: str | None):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=project, name=name, id=known, resume="allow", dir=str(folder), config=read_settings(folder)
        )
        self.id = str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # Not wandb's own step: it drops rows of steps that it has seen, as after a resume.
        self._run.log({**values, "train/step": step})

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log({_SAMPLES: self._table(columns=list(_COLUMNS), data=_cells(samples)), "train/step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """An MLflow run, apart from the active run of the process, which may be somebody's own."""

    def __init__(self, folder: Path, project: str, name: str, known: str | None):
        import mlflow

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self.id = known
            return
        experiment = self._client.get_experiment_by_name(project)
        place = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        self.id = str(self._client.create_run(place, run_name=name).info.run_id)
        settings = [
            self._entities.Param(f"{section}.{key}", str(value)[:_PARAM_LENGTH])
            for section, values in read_settings(folder).items()
            for key, value in values.items()
        ]
        for first in range(0, len(settings), _PARAMS_PER_CALL):
            self._client.log_batch(self.id, params=settings[first : first + _PARAMS_PER_CALL])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(key, float(value), now, step) for key, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        # Not log_table: that adds to the rows that are there, after a resume those of the same steps.
        self._client.log_text(self.id, as_markdown(samples), f"{_SAMPLES}.md")

    def close(self) -> None:
        self._client.set_terminated(self.id)


class _Trackio:
    """A Trackio run; it is known by its name."""

    def __init__(self, folder: Path, project: str, name: str, known: str | None):
        import trackio

        self._table = trackio.Table
        self._run = trackio.init(
            project=project,
            name=known or name,
            config=read_settings(folder),
            resume="never" if known is None else "allow",
            embed=False,
        )
        self.id = str(self._run.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({key: value for key, value in values.items() if key != "step"}, step=step)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log({_SAMPLES: self._table(columns=list(_COLUMNS), data=_cells(samples))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Swanlab:
    """A SwanLab run."""

    def __init__(self, folder: Path, project: str, name: str, known: str | None):
        import swanlab

        self._text = swanlab.Text
        again = {} if known is None else {"id": known, "resume": "allow"}
        self._run = swanlab.init(project=project, name=name, config=read_settings(folder), **again)
        self.id = str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({key: value for key, value in values.items() if key != "step"}, step=step)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        # It shows the texts of one name by step.
        drawn = [sample for sample in samples if sample["step"] == step]
        self._run.log({f"{_SAMPLES}/row {s['row']}": self._text(as_markdown([s])) for s in drawn}, step=step)

    def close(self) -> None:
        self._run.finish()


def _cells(samples: Sequence[Sample]) -> list[list[Any]]:
    """Rows of ``_COLUMNS``; what an answer was drawn for stands beside those before it."""
    return [[str(s["row"]), s["prompt"], s["step"], s["greedy"], s["sampled"]] for s in by_prompt(samples)]


_OPENED: dict[str, Callable[[Path, str, str, str | None], Service]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
    "swanlab": _Swanlab,
}
SERVICES = tuple(_OPENED)
_VARIABLES = {"wandb": ("WANDB_PROJECT", "WANDB_NAME"), "mlflow": ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME")}
"""Where each looks for project and name that no key sets."""
_ADVICE = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI",
    "trackio": "check TRACKIO_SPACE_ID, or unset it to log to this machine",
    "swanlab": "log in with `swanlab login`, or set SWANLAB_MODE=local",
}


def open_service(name: str, output_dir: Path, train: TrainConfig) -> ServiceTracker:
    """Begin a run at a service, or go on with the one of the run folder.

    Raises:
        UserError: it does not begin.
    """
    file = tracker_id_file(output_dir, name)
    known = file.read_text(encoding="utf-8").strip() if file.exists() else None
    variables = _VARIABLES.get(name, ("", ""))
    project = train.project or os.environ.get(variables[0]) or PROJECT
    run_name = train.run_name or os.environ.get(variables[1]) or output_dir.resolve().name
    with _as_user_error(name):
        service = _OPENED[name](output_dir, project, run_name, known)
    write_atomically(file, service.id + "\n")
    return ServiceTracker(name, service)


def check_wandb_login() -> None:
    """Raise a ``UserError`` when Weights & Biases would ask for a login once the run has begun."""
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return
    import wandb

    with _as_user_error("wandb"):
        # As its init does later: from the environment, a file, or the terminal.
        wandb.login(verify=False)


@contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"train.report_to {name}: {first}; {_ADVICE[name]}") from error


class ServiceTracker:
    """Hands rows to a service for as long as it takes them."""

    def __init__(self, name: str, service: Service):
        self.name = name
        self._service = service
        self._failures = self._lost = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._hand(f"step {step}", partial(self._service.log, step, values))

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        self._hand(f"the samples of step {step}", partial(self._service.show, step, samples))

    def _hand(self, what: str, give: Callable[[], None]) -> None:
        if self._failures >= _FAILURES:
            self._lost += 1
            return
        try:
            give()
        except Exception as error:
            self._failures += 1
            self._lost += 1
            self._tell(f"did not take {what}", error)
        else:
            self._failures = 0

    def flush(self) -> None:
        """Nothing: what a service has been given is its own."""

    def close(self) -> None:
        try:
            self._service.close()
        except Exception as error:
            self._tell("did not end its run", error)
        if self._lost:
            log.warning("train.report_to %s lacks %d rows; metrics.jsonl has all", self.name, self._lost)

    def _tell(self, what: str, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0]
        ends = "; no more are sent" if self._failures == _FAILURES else ""
        kind = type(error).__name__
        log.warning("train.report_to %s %s (%s: %s); training goes on%s", self.name, what, kind, reason, ends)
