"""Everything that happens before the first optimizer step: load and check."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import distributed
from ..config import format_diff
from ..config.schema import RunConfig
from ..data import Report
from ..data.groups import PreferenceDataset
from ..data.windows import Window
from ..errors import UserError
from ..model import Policy, load_tokenizer, ready_policy, resolve_device
from ..model.balance import Balance
from ..model.companions import describe_trained, take_template
from ..model.division import divide_work
from ..model.layouts import settled
from ..model.quantization import check_quantization, check_trainable
from ..packing import PlanSummary, check_fits, summarize_plan
from ..reference import weights_digest
from ..reference.template_date import with_template_date
from .best import check_metric
from .feed import TrainingFeed, total_steps
from .objective import Objective
from .optimizer import METRIC_SCHEDULES, check_optimizer, check_schedule, warn_of_long_warmup
from .references import References, check_first_loss, prepare_references, resolve_mode
from .resume import Start, check_balance, check_base, check_data, check_reference
from .storage import check_disk
from .terms import LossTerms
from .throughput import FlopModel, measure_matmul_rate
from .trackers import check_trackers
from .training_data import Loaded, check_window, load_data
from .window_feed import Lookup, WindowFeed

OnData = Callable[[dict[str, PreferenceDataset], torch.device], None]
"""Told of a run's data and device before anything is loaded on it."""

log = logging.getLogger(__name__)


@dataclass
class Setup:
    """A run that is ready to start."""

    config: RunConfig
    tokenizer: Any
    policy: Policy
    objective: Objective
    references: References
    datasets: dict[str, PreferenceDataset]
    """``train``, and those of evaluation, by ``DataConfig.eval_splits``."""
    lint: dict[str, Report]
    plan: PlanSummary
    feed: TrainingFeed
    peak_flops: float
    base: str
    """``weights_digest`` of the model before step 1."""
    first_loss: float | None
    """Mean sigmoid loss of a few rows before step 1; None where the policy does not start as a stored reference."""

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def held_out(self) -> list[str]:
        """The names of the evaluation sets; empty without evaluation data."""
        return [name for name in self.datasets if name != "train"]


def check_settings(config: RunConfig) -> None:
    """What can be said of a configuration before anything is loaded.

    Raises:
        UserError: settings that cannot run, or that do not fit each other.
    """
    check_schedule(config.optim)
    check_optimizer(config.optim.optimizer)
    check_quantization(config.model)
    check_trackers(config.train.report_to)
    if config.optim.lr_scheduler_type in METRIC_SCHEDULES and config.train.eval_steps is None:
        raise UserError(f"optim.lr_scheduler_type {config.optim.lr_scheduler_type} needs train.eval_steps")
    check_metric(config)
    _check_samples(config)
    resolve_mode(config, Objective(config.loss))
    if (words := LossTerms(config.loss).caution) is not None:
        log.warning("%s", words)


def _check_samples(config: RunConfig) -> None:
    if config.train.sample_steps is not None and not config.data.has_evaluation:
        raise UserError(
            "train.sample_steps answers held-out prompts: set data.eval_dataset_name or data.eval_fraction, or set it "
            "to null"
        )


def prepare(config: RunConfig, start: Start | None = None, *, on_data: OnData | None = None) -> Setup:
    """Load tokenizer, data, model and references, and check them.

    Args:
        on_data: is told of the data before the model is loaded.
        start: the checkpoint that the run goes on from, whose data and weights these must be.

    Raises:
        UserError: anything that the user can correct.
    """
    check_settings(config)
    divide_work(config)
    check_trainable(config.model)
    log.info("configuration, where it is not the default:\n%s", _indented(format_diff(config)))
    objective = Objective(config.loss, token_metrics=config.train.token_metrics)
    tokenizer = load_tokenizer(config.model)
    take_template(tokenizer, config.data)
    saved = start.state["config"].get("data.template_date") if start is not None else None
    config = with_template_date(config, tokenizer, saved)
    data = load_data(config, tokenizer, objective)
    datasets = data.datasets
    total = total_steps(config, datasets["train"].per_epoch)
    check_schedule(config.optim, total_steps=total)
    warn_of_long_warmup(config.optim, total_steps=total)
    if start is not None:
        check_data(start, config, datasets)
    device = resolve_device()
    if on_data is not None:
        on_data(datasets, device)
    policy = ready_policy(
        config.model,
        device,
        list(datasets.values()),
        packing=config.packing,
        train=config.train,
        weights_dtype=config.optim.weights_dtype,
    )
    balance = Balance.of(policy, config.loss.router_aux_loss_coef)
    if start is not None:
        check_balance(start, balance)
    packing = settled(config.packing, policy)
    for dataset in datasets.values() if policy.layout.in_rows else ():
        check_fits(dataset, tokens_per_pack=packing.tokens_per_pack, in_rows=True)
    check_disk(policy, config, done=start.step if start else 0, total=total)
    base = weights_digest(policy)
    if start is not None:
        check_base(start, config, base)
    references = prepare_references(config, policy, objective, datasets, say=log.info, base=base)
    objective.live_reference = references.live
    if start is not None:
        check_reference(start, config, references.weights)
    # After the digest, which knows the model as it was.
    describe_trained(policy.causal_lm, tokenizer)
    peak_flops = sum(distributed.gather(measure_matmul_rate(device, policy.compute_dtype)))
    laid_out = replace(config, packing=packing)
    feed = _feed(laid_out, tokenizer, data, policy, objective, references)
    plan = summarize_plan(datasets["train"], laid_out, mixers=policy.layout.mixer_blocks)
    first_loss = _first_loss(config, policy, references, objective, datasets["train"])
    return Setup(
        config, tokenizer, policy, objective, references, datasets, data.lint, plan, feed, peak_flops, base, first_loss
    )


def _feed(
    config: RunConfig, tokenizer: Any, data: Loaded, policy: Policy, objective: Objective, references: References
) -> TrainingFeed:
    """The steps of the run of ``config``, whose packing has the layout of the policy."""
    options: dict[str, Any] = {
        "lookup": references.lookup("train"),
        "flops": FlopModel.of(policy),
        "device": policy.device,
        "rows_of": policy.rows_of,
    }
    if data.stream is None or data.first is None:
        return TrainingFeed(data.datasets["train"], config.packs, config.train, **options)

    def ready(window: Window) -> Lookup:
        check_window(config, tokenizer, policy, objective, window)
        return references.of_window(window.dataset)

    return WindowFeed(data.stream, data.first, config.packs, config.train, ready=ready, **options)


def _first_loss(
    config: RunConfig, policy: Policy, references: References, objective: Objective, dataset: PreferenceDataset
) -> float | None:
    if "train" not in references.tables or config.reference.model_name_or_path is not None:
        return None
    return check_first_loss(policy, dataset, references.tables["train"], objective)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
