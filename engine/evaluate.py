"""``dpo evaluate``: the metrics of a model on the evaluation split, with the references that training takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import distributed
from .config import load_config
from .config.schema import LossConfig, ModelConfig, RunConfig
from .data import Report, check_files, load_dataset_groups
from .data.groups import PreferenceDataset
from .durable import write_atomically
from .errors import UserError, raise_all
from .inputs import check_inputs
from .memory_errors import advised
from .model import Policy, check_folder, load_adapter, load_tokenizer, ready_policy, resolve_device
from .model.adapter_forms import changes_base, is_adapter
from .model.adapters import import_peft
from .model.division import divide_work
from .model.quantization import check_quantization
from .model.sources import named_by
from .packing import check_fits
from .plain_json import to_json
from .reference.template_date import with_template_date
from .run_folder import (
    AS_TRAINED,
    CONFIG_FILE,
    DETAILS_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    SAMPLED,
    eval_prefixes,
    read_record,
)
from .train.divergence import sampled_divergence
from .train.evaluation import evaluate_splits, format_evaluation, write_evaluation
from .train.measures import format_details, with_text
from .train.mismatched import loss_groups
from .train.objective import Objective
from .train.references import full_model, load_reference, prepare_references
from .train.training_data import warn_of_trained_rows

_SAME_ROWS = 1e-2
"""Relative difference of mean log-probs and losses that another dtype or layout may cause on the same rows."""
_RERUN = "move the run elsewhere, then evaluate again to have its numbers, which are above, kept"

log = logging.getLogger(__name__)


@advised
def evaluate(
    config: RunConfig, model_path: str | None = None, *, own_loss: bool = False, samples: int = 0
) -> dict[str, float]:
    """Evaluate a model on the evaluation split of ``config``.

    References come from where training takes them: they belong to the model that ``config`` names, not to the one that
    is evaluated. When ``model_path`` is the folder of a run, the loss is that of the run, evaluation rows that it was
    trained on are warned of, and the result is also written there as ``evaluation.json`` and
    ``evaluation_details.json``.

    Args:
        model_path: a model or adapter folder, or a Hub id; by default the model before training.
        own_loss: take the ``loss`` section of ``config`` for a run, too.
        samples: answers to draw of the model to each of ``train.sample_prompts`` prompts, for ``eval_sampled/kl``.

    Returns:
        ``eval_loss``, ``eval_rewards/*``, ``eval_logps/*``, ``eval_ranking_accuracy``,
        ``eval_ranking_accuracy_per_token``, ``eval_num_pairs``, what docs/evaluation.md defines, and accuracies by
        length of the longest response; of each of several sets, ``eval_NAME_loss`` and so on.

    Raises:
        UserError: no evaluation data, or a model that cannot be loaded.
    """
    distributed.set_timeout(config.train.timeout_minutes)
    divide_work(config)
    check_quantization(config.model)
    own = [] if model_path is None else [partial(check_folder, model_path, "--model ")]
    raise_all([*own, partial(check_inputs, config, splits=("eval",))])
    tokenizer = load_tokenizer(config.model)
    run = None if model_path is None else _run_of(Path(model_path))
    if run is not None and not own_loss:
        config = _with_loss(config, run)
    config = with_template_date(config, tokenizer, None if run is None else run.data.template_date)
    datasets, lint = _load_data(config, tokenizer)
    if run is not None:
        _compare(run, tokenizer, datasets, lint, unpair=config.loss.unpaired)
    packing = config.packs
    fits = partial(
        check_fits,
        tokens_per_pack=packing.tokens_per_pack,
        share_prompts=packing.share_prompts,
        processes=config.train.context_parallel,
    )
    for dataset in datasets.values():
        fits(dataset)
    if model_path is None:
        log.info(
            "evaluating %s, the model before training",
            config.model.adapter_name_or_path or config.model.model_name_or_path,
        )
    policy, trained = _load_both(config, model_path, list(datasets.values()))
    objective = Objective(config.loss, token_metrics=config.train.token_metrics)
    for dataset in datasets.values():
        fits(dataset, in_rows=policy.layout.in_rows or trained.layout.in_rows)
        objective.check_dataset(dataset)
    config = _fixed_reference(config)
    references = prepare_references(config, policy, objective, datasets, say=log.info)
    objective.live_reference = references.live
    details: dict[str, dict[str, Any]] = {}
    values = evaluate_splits(
        trained, datasets, objective, config, lookup=references.lookup, progress=True, details=details
    )
    if samples:
        values |= _divergences(config, trained, policy, datasets, tokenizer, samples)
    log.info(format_evaluation(values))
    with_text(details, datasets, tokenizer)
    if words := format_details(details):
        log.info("%s", words)
    if distributed.is_main() and model_path is not None and (Path(model_path) / METRICS_FILE).exists():
        folder = Path(model_path)
        write_evaluation(folder, values | _as_trained(folder, values), elsewhere=_RERUN)
        write_atomically(folder / DETAILS_FILE, to_json(details, indent=1) + "\n", elsewhere=_RERUN)
    return values


def _divergences(
    config: RunConfig,
    trained: Policy,
    before: Policy,
    datasets: dict[str, PreferenceDataset],
    tokenizer: Any,
    samples: int,
) -> dict[str, float]:
    """``sampled_divergence`` from the reference, or from the model before training, for each evaluation set. Processes
    draw and score the same answers, which a sharded model needs."""
    if config.train.context_parallel > 1:
        raise UserError(
            "--samples scores whole answers in each process: set train.context_parallel to 1, or leave it out"
        )
    other = config.reference.model_name_or_path is not None
    reference = load_reference(config, trained.device, list(datasets.values())) if other else before
    values: dict[str, float] = {}
    for split, dataset in datasets.items():
        found = sampled_divergence(trained, reference, dataset, config, tokenizer, samples=samples)
        values |= {f"{split}_{SAMPLED}{name}": value for name, value in found.items()}
    return values


def _fixed_reference(config: RunConfig) -> RunConfig:
    """With the reference before training, which is what is known of one that training moved."""
    if not config.reference.sync_ref_model:
        return config
    log.info("reference.sync_ref_model: the reference is the one before training; the run's own evaluations moved it")
    return replace(config, reference=replace(config.reference, sync_ref_model=False))


def _run_of(folder: Path) -> RunConfig | None:
    """The configuration of the run that a folder is of."""
    return load_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else None


def _with_loss(config: RunConfig, run: RunConfig) -> RunConfig:
    if config.loss == run.loss:
        return config
    log.info("the loss is that of the run: %s, beta %g; --loss.KEY takes that of the configuration", *_words(run.loss))
    try:
        return replace(config, loss=run.loss)
    except ValueError as error:
        raise UserError(f"the loss of the run does not fit the configuration: {error}") from error


def _words(loss: LossConfig) -> tuple[str, float]:
    return loss.loss_name, loss.beta


def _load_data(config: RunConfig, tokenizer: Any) -> tuple[dict[str, PreferenceDataset], dict[str, Report]]:
    datasets: dict[str, PreferenceDataset] = {}
    lint: dict[str, Report] = {}
    for split in config.data.eval_splits or ("eval",):
        dataset, lint[split] = load_dataset_groups(config.data, tokenizer, split=split, unpair=config.loss.unpaired)
        datasets[split] = loss_groups(config, dataset, split=split)
    return datasets, lint


def _compare(
    run: RunConfig, tokenizer: Any, datasets: dict[str, PreferenceDataset], lint: dict[str, Report], *, unpair: bool
) -> None:
    """Warn of rows that the run was trained on, as training does, where its data is still there."""
    try:
        check_files(run.data, splits=("train",), first_rows=False)
        data = replace(run.data, strict=False)
        trained = load_dataset_groups(data, tokenizer, split="train", unpair=unpair)[0]
    except UserError as error:
        log.warning("whether the evaluation rows were trained on is not known: %s", error)
        return
    warn_of_trained_rows({"train": trained, **datasets}, lint, strict=False)


def _load_both(config: RunConfig, model_path: str | None, datasets: list[PreferenceDataset]) -> tuple[Policy, Policy]:
    """The model before training, to which references belong, and the one to evaluate; they may be one."""
    ready = partial(
        ready_policy,
        device=resolve_device(),
        datasets=datasets,
        packing=config.packing,
        compare=False,
        weights_dtype=config.optim.weights_dtype,
    )
    if model_path is None:
        policy = ready(config.model)
        return policy, policy
    if not is_adapter(Path(model_path)):
        return ready(config.model), _ready_trained(ready, config.model, model_path)
    put = partial(put_adapter, model_path=model_path)
    if _changes_base(config.model, model_path):
        base = replace(config.model, lora=None, adapter_name_or_path=None)
        return ready(config.model), ready(base, change=put)
    policy = ready(config.model, change=put)
    return policy, policy


def put_adapter(base: Policy, model_path: str) -> None:
    """Put the adapter in folder ``model_path`` on a policy that is not sharded yet, whatever adapters that has.

    Raises:
        UserError: the adapter does not fit the base.
    """
    on_meta = torch.device("meta") if base.device.type == "meta" else nullcontext()
    with named_by("--model ", model_path), on_meta:
        load_adapter(base, Path(model_path))


def _changes_base(model: ModelConfig, adapter: str) -> bool:
    """Whether ``adapter`` and the reference cannot share one base, since one of them has changed it."""
    import_peft(f"--model {adapter}")
    own = model.adapter_name_or_path
    return changes_base(adapter) or (own is not None and changes_base(own))


def _ready_trained(ready: Callable[[ModelConfig], Policy], model: ModelConfig, model_path: str) -> Policy:
    """The full model at ``model_path``; ``model`` says how it is held, but for its adapters and quantization."""
    with named_by("--model ", model_path):
        policy = ready(replace(full_model(model), model_name_or_path=model_path, revision=None))
    if model.trains_adapter:
        log.info("%s is a full model: the adapters and quantization of model are not applied", model_path)
    return policy


def _as_trained(run_dir: Path, values: dict[str, float]) -> dict[str, float]:
    """What ``evaluation.json`` of a run whose model was rounded says of it before: it cannot be measured again.

    Args:
        values: a new evaluation. Nothing is kept when it is of other rows, as the log-probs of the same weights tell.
    """
    try:
        before = read_record(run_dir / EVALUATION_FILE)
    except UserError as error:
        log.warning("it is written anew: %s", error)
        return {}
    names = ("num_pairs", "logps/chosen", "logps/rejected", "loss")
    same = [name for prefix in eval_prefixes(values) for part in names if (name := prefix + part) in values]
    if not all(_close(before.get(name), values[name]) for name in same):
        return {}
    return {name: value for name, value in before.items() if name.startswith(AS_TRAINED)}


def _close(before: float | None, value: float) -> bool:
    return before is not None and math.isclose(before, value, rel_tol=_SAME_ROWS)
