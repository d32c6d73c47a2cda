"""Where a run goes on from, and what may differ from the run that began: all that does not change what is learned.

Settings that lead to data and weights are judged by what they lead to, whose digests every checkpoint holds. Another
number of steps goes on, with the schedule of that number.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from ..config import load_config
from ..config.schema import LoraConfig, RunConfig
from ..data.groups import PreferenceDataset
from ..durable import check_content, is_complete, remove_leftovers
from ..errors import UserError
from ..model.balance import Balance
from ..run_folder import CONFIG_FILE, METRICS_FILE, read_metrics
from . import checkpoint as checkpoints
from .best import Best
from .feed import count_steps, total_steps
from .optimizer import METRIC_SCHEDULES

_FREE_KEYS = frozenset(
    (
        *("packing.tokens_per_pack", "packing.share_prompts", "packing.layout", "model.attention"),
        *("model.kernels", "model.trust_remote_code"),
        *("data.strict", "data.eval_dataset_name", "data.eval_dataset_split", "reference.store", "reference.mode"),
        *("train.output_dir", "train.save_steps", "train.save_total_limit", "train.logging_steps", "train.eval_steps"),
        *("train.gradient_checkpointing", "train.activation_offload", "train.timeout_minutes", "train.report_to"),
        "optim.offload",
        *("train.save_dtype", "train.save_rounding", "train.async_save", "train.token_metrics", "data.cache"),
        *("train.sample_steps", "train.sample_prompts", "train.sample_max_new_tokens", "train.sample_temperature"),
        *("train.shards_per_replica", "train.context_parallel"),
        *("train.run_name", "train.project"),
        *("train.load_best_model_at_end", "train.early_stopping_patience", "train.early_stopping_threshold"),
    )
)
"""Keys that may change between a run and its resumption: they do not change what is learned."""
_STEP_KEYS = ("train.max_steps", "train.num_train_epochs")
_PATIENCE_KEYS = ("train.early_stopping_patience", "train.early_stopping_threshold")
"""With the step keys, what says when a run ends."""
_DATA_KEYS = frozenset(
    (
        *(
            "data.dataset_name",
            "data.datasets",
            "data.dataset_config",
            "data.dataset_train_split",
            "data.max_length",
            "data.format",
        ),
        *("data.truncation_mode", "data.scored_pairs", "data.min_score_gap", "data.chat_template", "data.max_rows"),
        *("data.columns", "data.turn_fields", "data.roles", "data.system", "data.remove_none_values", "data.lost_text"),
        *("data.template_date", "data.eval_fraction", "data.mask_pattern"),
        *("data.streaming", "data.stream_window"),
        "model.tokenizer_name_or_path",
    )
)
"""What leads to the training data: its digest decides."""
_STREAM_KEYS = _DATA_KEYS - {"data.dataset_name", "data.streaming", "data.stream_window"}
"""What leads from the rows of a stream to those of its later windows."""
_BASE_KEYS = frozenset({"model.model_name_or_path", "model.revision", "model.adapter_name_or_path"})
"""What leads to the weights before step 1: their digest decides."""
_ROUTER_KEY = "loss.router_aux_loss_coef"
"""Where a checkpoint lacks it, no load-balancing loss was there yet; its default depends on the model."""
_REFERENCE_KEY = "reference.model_name_or_path"
_NEW_RUN = "or start a new run in another train.output_dir"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    output_dir: Path
    steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last row of training metrics, and the last evaluation's when there was one."""
    resumed_from: int | None = None
    """Step of the checkpoint that the run continued from."""


class Start(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    state: dict[str, Any]
    ended: int = 0
    """Steps of the finished run that is extended."""

    @property
    def step(self) -> int:
        return self.state["step"]

    def total(self, groups: int) -> int:
        """Steps of the run that wrote it, on data of so many groups an epoch."""
        saved = self.state["config"]
        return count_steps(
            groups,
            pairs_per_step=saved["packing.pairs_per_step"],
            max_steps=saved["train.max_steps"],
            epochs=saved["train.num_train_epochs"],
        )


def find_start(config: RunConfig, output_dir: Path, resume: bool) -> tuple[Start | None, TrainResult | None]:
    """The checkpoint to continue from (None at the start), and the result of a run that has no step left to do.

    Raises:
        UserError: the folder holds a run that is not to be resumed, or another one, or a damaged checkpoint.
    """
    if not resume:
        checkpoints.refuse_other_run(output_dir)
        return None, None
    start = None
    written = output_dir / CONFIG_FILE
    saved = config_values(load_config(written)) if written.exists() else None
    newest = checkpoints.newest_checkpoint(output_dir)
    if newest is not None:
        start = Start(newest[1], checkpoints.read_state(newest[1]))
        check_same_run(start.state["config"], config, start.path)
    elif saved is not None:
        check_same_run(saved, config, output_dir)
    if not is_complete(output_dir):
        if start is None and output_dir.exists():
            log.info("no complete checkpoint in %s: training starts at step 1", output_dir)
        return start, None
    steps = int(_last_metrics(output_dir)["step"])
    now = config_values(config)
    same_keys = saved is None or all(saved[key] == now[key] for key in (*_STEP_KEYS, *_PATIENCE_KEYS))
    if same_keys or config.train.max_steps == steps:
        return start, _finished(output_dir)
    start = _extended(start, config, output_dir, steps)
    best = Best(config)
    best.load(start.state.get("best", {}))
    if start.step == steps and best.ends_run:
        log.info("%s; more steps alone change nothing, a larger train.early_stopping_patience goes on", best.words)
        return start, _finished(output_dir)
    return start, None


def _extended(start: Start | None, config: RunConfig, output_dir: Path, steps: int) -> Start:
    """The checkpoint that a run goes on from that is finished after so many steps."""
    if start is None:
        key = "adapter_name_or_path" if config.model.trains_adapter else "model_name_or_path"
        raise UserError(
            f"cannot resume {output_dir}: it is finished after {steps} steps and holds no checkpoint, whose optimizer "
            f"state further steps need: set {' and '.join(_STEP_KEYS)} back, or start a new run from its result with "
            f"model.{key}={output_dir} and another train.output_dir"
        )
    return start._replace(ended=steps)


def _finished(output_dir: Path) -> TrainResult:
    """The result of a run that has ended, from its metrics."""
    remove_leftovers(output_dir)
    checkpoints.remove_stopped(output_dir)
    check_content(output_dir, remedy="delete this file to have the model written again")
    metrics = _last_metrics(output_dir)
    return TrainResult(output_dir, int(metrics["step"]), metrics)


def _last_metrics(output_dir: Path) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for row in read_metrics(output_dir / METRICS_FILE):
        metrics |= row
    return metrics


def config_values(config: RunConfig) -> dict[str, Any]:
    """Every setting under its dotted name, as plain JSON values."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, item in value.items() for k, v in walk(f"{prefix}.{name}", item).items()}

    plain = json.loads(json.dumps(asdict(config)))
    return {k: v for section, value in plain.items() for k, v in walk(section, value).items()}


def check_same_run(saved: Mapping[str, Any], config: RunConfig, where: Path) -> None:
    """Raise a ``UserError`` that names the first setting that would change what is learned.

    What leads to data, weights and a reference model is left to ``check_data``, ``check_base`` and ``check_reference``.
    A setting that an older run did not know had its default.
    """
    now = config_values(config)
    free = {*_FREE_KEYS, *_STEP_KEYS, *_DATA_KEYS, *_BASE_KEYS, _REFERENCE_KEY}
    if _ROUTER_KEY not in saved:
        free.add(_ROUTER_KEY)
    saved = _with_defaults(saved)
    if config.optim.lr_scheduler_type in METRIC_SCHEDULES:
        free.remove("train.eval_steps")
    for key in sorted(key for key in saved.keys() | now.keys() if not _is_among(key, free)):
        before, after = saved.get(key), now.get(key)
        if before != after:
            raise UserError(
                f"cannot resume {where}: {key} was {before!r} and is now {after!r}, which changes the training; "
                f"set it back, {_NEW_RUN}"
            )


def check_balance(start: Start, balance: Balance | None) -> None:
    """Raise a ``UserError`` when a run that began without a load-balancing loss would go on with one."""
    if _ROUTER_KEY not in start.state["config"] and balance is not None:
        raise UserError(
            f"cannot resume {start.path}: it began without a load-balancing loss, which the model has now with a "
            f"coefficient of {balance.coefficient:g}; set {_ROUTER_KEY} to 0, {_NEW_RUN}"
        )


def digests(datasets: Mapping[str, PreferenceDataset]) -> dict[str, Any]:
    """What a checkpoint knows its data by."""
    evaluated = {name: dataset.digest for name, dataset in datasets.items() if name != "train"}
    # Of one set without a name it is its digest, as it was before there were several.
    known = evaluated.get("eval", evaluated or None)
    return {"data": datasets["train"].digest, "eval_data": known}


def check_data(start: Start, config: RunConfig, datasets: Mapping[str, PreferenceDataset]) -> None:
    """Raise a ``UserError`` when the data is not what a run began with, or fewer steps are asked for than are done."""
    now = digests(datasets)
    # Of a stream the digest is that of the first window, and settings say what the others are.
    settings = _changes(start, config, _STREAM_KEYS) if start.state.get("stream") and config.data.streaming else ""
    if start.state["data"] != now["data"] or settings:
        changed = settings or _changes(start, config, _DATA_KEYS) or "rows, tokenizer or chat template changed"
        raise UserError(
            f"cannot resume {start.path}: the training data is not what it was ({changed}); restore it, {_NEW_RUN}"
        )
    _check_eval_data(start, config, now["eval_data"])
    train = config.train
    total = total_steps(config, datasets["train"].per_epoch)
    done = max(start.step, start.ended)
    if total < done:
        key = "max_steps" if train.max_steps > 0 else "num_train_epochs"
        raise UserError(
            f"cannot resume {start.path}: {done} steps are done, and train.{key}={getattr(train, key):g} asks for "
            f"{total}; ask for as many or more, {_NEW_RUN}"
        )


def _check_eval_data(start: Start, config: RunConfig, now: Any) -> None:
    """Whether it is what it was, where what is learned or kept depends on it."""
    if start.state.get("eval_data", now) == now:
        return
    if config.optim.lr_scheduler_type in METRIC_SCHEDULES:
        why = f"optim.lr_scheduler_type {config.optim.lr_scheduler_type} moves on it"
    elif config.train.compares and start.state.get("best", {}).get("value") is not None:
        why = "the best evaluation so far was of that"
    else:
        return
    raise UserError(
        f"cannot resume {start.path}: the evaluation data is not what it was, and {why}; restore it, {_NEW_RUN}"
    )


def check_base(start: Start, config: RunConfig, base: str) -> None:
    """Raise a ``UserError`` when training would start from other weights than when the run began.

    Args:
        base: ``weights_digest`` of the model before step 1.
    """
    if start.state["base"] != base:
        changed = _changes(start, config, _BASE_KEYS)
        raise UserError(
            f"cannot resume {start.path}: model.model_name_or_path={config.model.model_name_or_path} holds other "
            f"weights than when the run began{f' ({changed})' if changed else ''}; restore them, on the Hub by "
            f"model.revision, {_NEW_RUN}"
        )


def check_reference(start: Start, config: RunConfig, digest: str | None) -> None:
    """Raise a ``UserError`` when the reference model that is named holds other weights than when the run began.

    Args:
        digest: ``weights_digest`` of it; None when none is named.
    """
    changed = _changes(start, config, {_REFERENCE_KEY})
    # Older checkpoints hold no digest of it: there the name decides.
    same = start.state["reference"] == digest if "reference" in start.state else not changed
    if not same:
        raise UserError(
            f"cannot resume {start.path}: the reference model holds other weights than when the run began"
            f"{f' ({changed})' if changed else ''}; restore them, {_NEW_RUN}"
        )


def _changes(start: Start, config: RunConfig, keys: frozenset[str] | set[str]) -> str:
    """Those of the keys that have changed, in words."""
    before, now = _with_defaults(start.state["config"]), config_values(config)
    among = sorted(key for key in before.keys() | now.keys() if _is_among(key, keys))
    changed = [key for key in among if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in changed)


def _with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, and at its default each that it does not know: the run was made before it was."""
    sections = {**get_type_hints(RunConfig), "model.lora": LoraConfig}
    # A run without adapters has no settings of adapters.
    there = [name for name in sections if any(key.startswith(f"{name}.") for key in saved)]
    known = {f"{name}.{f.name}": f.default for name in there for f in fields(sections[name])}
    defaults = json.loads(json.dumps({key: value for key, value in known.items() if value is not MISSING}))
    return {**defaults, **saved}


def _is_among(key: str, keys: Collection[str]) -> bool:
    """Whether a key, or the mapping that it is an entry of, is one of the keys."""
    return key in keys or key.rpartition(".")[0] in keys
