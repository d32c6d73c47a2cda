"""Everything that happens before the first optimizer step: load, check, say what will run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_kernels import describe

from .. import distributed
from ..config import format_diff
from ..config.schema import RunConfig
from ..data import Report, load_dataset_groups
from ..data.groups import PreferenceDataset
from ..data.held_out import HeldOut
from ..data.mixture import describe_mixture
from ..data.row_numbers import NumberSummary
from ..durable import write_atomically
from ..errors import UserError, counted
from ..model import Policy, load_tokenizer, ready_policy, resolve_device
from ..model.balance import Balance
from ..model.companions import describe_trained, take_template
from ..model.head import head_words
from ..model.layouts import attention_words, describe_layout, settled
from ..model.quantization import check_quantization, check_trainable, num_weights
from ..model.stops import LearnedStops
from ..packing import PlanSummary, check_fits, mixer_padding_words, summarize_plan
from ..reference import weights_digest
from ..reference.template_date import with_template_date
from ..run_folder import DATA_FILE
from .best import check_metric
from .feed import TrainingFeed, drawn_groups, total_steps
from .objective import Objective
from .optimizer import METRIC_SCHEDULES, check_optimizer, check_schedule, warn_of_long_warmup
from .references import References, check_first_loss, prepare_references, resolve_mode
from .resume import Start, check_balance, check_base, check_data, check_reference
from .storage import check_disk
from .terms import LossTerms
from .throughput import FlopModel, measure_matmul_rate
from .trackers import check_trackers

_LENGTHS_SAVED = 50_000

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
    resolve_mode(config, Objective(config.loss))
    if (words := LossTerms(config.loss).caution) is not None:
        log.warning("%s", words)


def prepare(config: RunConfig, start: Start | None = None, *, on_data: OnData | None = None) -> Setup:
    """Load tokenizer, data, model and references, check them, and print what will run.

    Args:
        on_data: is told of the data before the model is loaded.
        start: the checkpoint that the run goes on from, whose data and weights these must be.

    Raises:
        UserError: anything that the user can correct.
    """
    check_settings(config)
    check_trainable(config.model)
    log.info("configuration, where it is not the default:\n%s", _indented(format_diff(config)))
    objective = Objective(config.loss, token_metrics=config.train.token_metrics)
    tokenizer = load_tokenizer(config.model)
    take_template(tokenizer, config.data)
    saved = start.state["config"].get("data.template_date") if start is not None else None
    config = with_template_date(config, tokenizer, saved)
    datasets, lint = _load_data(config, tokenizer, objective)
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
    references = prepare_references(config, policy, objective, datasets, say=log.info)
    objective.live_reference = references.live
    if start is not None:
        check_reference(start, config, references.weights)
    # After the digest, which knows the model as it was.
    describe_trained(policy.causal_lm, tokenizer)
    peak_flops = sum(distributed.gather(measure_matmul_rate(device, policy.compute_dtype)))
    feed = TrainingFeed(
        datasets["train"],
        packing,
        config.train,
        lookup=references.lookup("train"),
        flops=FlopModel.of(policy),
        device=device,
        rows_of=policy.rows_of,
    )
    plan = summarize_plan(datasets["train"], replace(config, packing=packing), mixers=policy.layout.mixer_blocks)
    first_loss = _first_loss(config, policy, references, objective, datasets["train"])
    setup = Setup(
        config, tokenizer, policy, objective, references, datasets, lint, plan, feed, peak_flops, base, first_loss
    )
    log.info("%s", describe_run(setup))
    return setup


def _first_loss(
    config: RunConfig, policy: Policy, references: References, objective: Objective, dataset: PreferenceDataset
) -> float | None:
    if "train" not in references.tables or config.reference.model_name_or_path is not None:
        return None
    return check_first_loss(policy, dataset, references.tables["train"], objective)


def _load_data(
    config: RunConfig, tokenizer: Any, objective: Objective
) -> tuple[dict[str, PreferenceDataset], dict[str, Report]]:
    datasets: dict[str, PreferenceDataset] = {}
    lint: dict[str, Report] = {}
    for split in ("train", *config.data.eval_splits):
        datasets[split], lint[split] = load_dataset_groups(config.data, tokenizer, split=split)
        if split == "train":
            _note_stops(config, tokenizer, datasets[split], lint[split])
            datasets[split] = drawn_groups(config, datasets[split])
        objective.check_dataset(datasets[split])
        check_fits(
            datasets[split],
            tokens_per_pack=config.packing.tokens_per_pack,
            share_prompts=config.packing.share_prompts,
            in_rows=config.packing.layout == "rows",
        )
    if config.data.has_evaluation:
        warn_of_trained_rows(datasets, lint, config.data.strict)
    return datasets, lint


def _note_stops(config: RunConfig, tokenizer: Any, dataset: PreferenceDataset, report: Report) -> None:
    """Note which rows teach the model to stop where generation does not."""
    stops = LearnedStops(config.model, tokenizer, config.data.max_length)
    stops.look_at(dataset, report)
    if words := stops.words():
        log.warning("%s", words)
    report.raise_if_strict(config.data.strict)


def warn_of_trained_rows(datasets: Mapping[str, PreferenceDataset], lint: Mapping[str, Report], strict: bool) -> None:
    """Note in the reports of the evaluation data which of its rows are trained on, and say how many.

    Raises:
        UserError: there are some, and ``strict``.
    """
    held_out = HeldOut()
    for group in datasets["train"]:
        held_out.trains(group)
    for split, dataset in datasets.items():
        if split == "train":
            continue
        for group in dataset:
            held_out.evaluates(group)
        if found := held_out.report(lint[split]):
            log.warning(
                "%s of %s evaluation rows%s are not held out: row or prompt is trained on, too (`dpo check` says "
                "which)",
                f"{found:,}",
                f"{len(dataset):,}",
                "" if split == "eval" else f" of {split.removeprefix('eval_')}",
            )
        lint[split].raise_if_strict(strict)


def describe_run(setup: Setup) -> str:
    """The block that a run prints before its first step."""
    config, policy, plan = setup.config, setup.policy, setup.plan
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = sum(num_weights(p) for p in policy.parameters())
    dtype = str(policy.compute_dtype).removeprefix("torch.")
    held = f", base in {config.model.quantization}" if config.model.quantization else ""
    rows = [
        (
            "model",
            f"{type(policy.causal_lm).__name__}, {_count(trained)} of {_count(total)} parameters trained, "
            f"{dtype}{held}",
        ),
        *([("head", head_words(policy.causal_lm))] if policy.has_adapter else []),
        *([("processes", _process_words(setup))] if distributed.size() > 1 else []),
        ("attention", attention_words(policy)),
        ("layout", describe_layout(policy)),
        *([("mixer padding", f"{plan.mixer_padding:.1%} {mixer_padding_words(plan)}")] if plan.mixer_cells else []),
        ("loss", f"{config.loss.loss_name}, {_loss_op(setup)}"),
        *_balance_rows(setup),
        ("dropout", _dropout_words(config, policy.disabled_dropouts)),
        *((f"data ({name})", _data_words(setup, name)) for name in setup.datasets),
        *_number_rows(setup),
        (
            "packing",
            f"{counted(plan.packs, 'pack')} per epoch, {plan.fill:.1%} full; {plan.packed_tokens:,} tokens, "
            f"{plan.saved_by_sharing:.1%} saved by sharing prompts",
        ),
        (
            "steps",
            f"{setup.feed.total_steps:,} of {config.packing.pairs_per_step} {_step_unit(setup)}, "
            f"{plan.steps_per_epoch:,} per epoch",
        ),
        ("reference", setup.references.source),
        *_storage_rows(config),
        ("start-up check", _first_loss_words(setup)),
        ("matmul peak", f"{setup.peak_flops / 1e12:.3g} TFLOP/s here in {dtype}, what perf/mfu is a share of"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _number_rows(setup: Setup) -> list[tuple[str, str]]:
    """What rows have of weights, margins and masks, which change what is learned."""
    words = {name: NumberSummary(dataset).words() for name, dataset in setup.datasets.items()}
    return [(f"rows ({name})", text) for name, text in words.items() if text]


def _process_words(setup: Setup) -> str:
    shared = "parameters, gradients and optimizer state are sharded over them"
    return f"{distributed.size()} on {setup.device.type}; {shared} (FSDP2)"


def _loss_op(setup: Setup) -> str:
    chosen = describe(setup.device, setup.policy.compute_dtype)
    objective = setup.objective
    if objective.needs_token_logps or (setup.datasets["train"].lengths.responses != 2).any():
        op, choice = "linear_logps", chosen.linear_logps
    else:
        op, choice = "linear_dpo_loss", chosen.linear_dpo_loss
    coupled = "; couples pairs: computed over whole steps, in two passes" if objective.couples_pairs else ""
    return f"{op}: {choice.impl} ({choice.reason}){coupled}"


def _balance_rows(setup: Setup) -> list[tuple[str, str]]:
    wanted = setup.config.loss.router_aux_loss_coef
    balance = Balance.of(setup.policy, wanted)
    if balance is None:
        return []
    source = "the model's own coefficient" if wanted is None else "loss.router_aux_loss_coef"
    passes = setup.plan.packs > setup.plan.steps_per_epoch or distributed.size() > 1
    extra = "; a forward pass more, since steps have several packs" if passes else ""
    return [("experts", f"load-balancing loss of whole steps x {balance.coefficient:g} ({source}){extra}")]


def rounding_words(config: RunConfig) -> str:
    """How the final model is rounded."""
    how = {"nearest": "to nearest", "stochastic": "up or down at random, without bias"}
    return f"{config.train.save_dtype}, rounded {how[config.train.save_rounding]}"


def _storage_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Said before training, since what is rounded away then is gone."""
    if config.train.save_dtype != "bfloat16":
        return []
    nearest = config.train.save_rounding == "nearest"
    advice = "; small updates are lost, train.save_rounding stochastic keeps their sum" if nearest else ""
    return [("stored as", rounding_words(config) + advice)]


def _dropout_words(config: RunConfig, disabled: int) -> str:
    adapter = config.model.lora.dropout if config.model.lora else 0.0
    found = f"{disabled:,} probabilities set to 0" if disabled else "it had none"
    return f"disabled in the model ({found})" + (f"; {adapter:g} in the adapters, as configured" if adapter else "")


def _step_unit(setup: Setup) -> str:
    terms_G = setup.datasets["train"].terms
    if (terms_G > 1).any():
        return f"prompts ({terms_G.mean():.1f} pairs each)"
    if _ranks(setup):
        return f"rankings ({setup.datasets['train'].lengths.responses.mean():.1f} responses each)"
    return "pairs"


def _ranks(setup: Setup) -> bool:
    """Whether rows are rankings of more than two responses."""
    dataset = setup.datasets["train"]
    return not dataset.has_pairs.any() and bool((dataset.lengths.responses > 2).any())


def _data_words(setup: Setup, name: str) -> str:
    lint, dataset = setup.lint[name], setup.datasets[name]
    tokens = int(dataset.lengths.sizes_P.sum())
    dropped = f", {lint.dropped:,} dropped (`dpo check` says why)" if lint.dropped else ""
    words = f"{len(dataset):,} of {lint.total:,} rows{dropped}; {tokens:,} tokens"
    if (fraction := setup.config.data.eval_fraction) is not None:
        part = "without the share" if name == "train" else "the share"
        words += f"; {part} of {fraction:g} of the prompts that is held out (data.eval_fraction)"
    if dataset.mixture is None:
        return words
    sets = "".join(f"\n  {line}" for line in describe_mixture(dataset.mixture, dataset.source_names))
    return f"{words} in {len(dataset.source_names)} sets, {dataset.per_epoch:,} rows an epoch{sets}"


def _first_loss_words(setup: Setup) -> str:
    if setup.first_loss is None:
        return "none: the policy does not start as a stored reference"
    of = " of the two best responses" if _ranks(setup) else ""
    return f"stored references match; sigmoid loss{of} {setup.first_loss:.6f} (ln 2 = {math.log(2):.6f})"


def write_data_file(setup: Setup, output_dir: Path) -> None:
    """``data.json``: token counts of the training rows (evenly spaced ones when there are many), lint, plan."""
    lengths = setup.datasets["train"].lengths
    stride = math.ceil(len(lengths) / _LENGTHS_SAVED)
    sample = lengths[::stride]
    record = {
        "lengths": {
            "prompt": [int(n[0]) for n in sample],
            "chosen": [int(n[1]) for n in sample],
            "rejected": [int(x) for n in sample for x in np.asarray(n[2:])],
        },
        "rows_per_length": stride,
        "lint": _lint(setup.lint),
        "plan": asdict(setup.plan),
        "layout": {**setup.policy.layout._asdict(), "words": describe_layout(setup.policy)},
    }
    write_atomically(output_dir / DATA_FILE, json.dumps(record) + "\n")


def _lint(reports: dict[str, Report]) -> dict[str, Any]:
    """The report of the training data; those of other splits are in it by the names of theirs."""
    found: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
    return {**found.pop("train"), **found}


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
