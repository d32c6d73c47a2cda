"""Evaluation on held-out preference pairs: no gradients, no logits kept.

Beside the metrics of training under ``eval_`` names there is the ranking accuracy, which needs no reference: how often
the model gives the chosen response the higher log-prob, summed and per token.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.chunks import to_device

from . import distributed, stop
from .config.schema import ModelConfig, RunConfig
from .data import load_dataset_groups
from .data.groups import PreferenceDataset, pair_places
from .durable import CONTINUE, write_atomically
from .errors import UserError
from .model import (
    Policy,
    check_dataset,
    check_folder,
    check_packing,
    load_adapter,
    load_policy,
    load_tokenizer,
    resolve_device,
    shard_policy,
)
from .model.adapter_forms import changes_base, is_adapter
from .model.adapters import import_peft
from .model.load import shapes_alone
from .model.quantization import check_quantization
from .packing import Pack, build_batch, check_fits, group_costs, group_sizes, pack_groups
from .run_folder import AS_TRAINED, BY_LENGTH, EVALUATION_FILE, METRICS_FILE, PAIRS_BY_LENGTH, read_record
from .train.metrics import PREFERENCE_NAMES, TOKEN_NAMES
from .train.objective import Objective
from .train.references import full_model, prepare_references

_SAME_ROWS = 1e-2
"""Relative difference of mean log-probs and losses that another dtype or layout may cause on the same rows."""
_RERUN = "its numbers are above; free space or make the folder writable to have them kept, and evaluate again"

log = logging.getLogger(__name__)


class _Scores(NamedTuple):
    """Log-probs of all responses of a dataset, in its order."""

    logps_S: Tensor
    ref_S: Tensor | None
    sums_SK: Tensor
    """Of the statistics of tokens that were asked for."""


def evaluate(config: RunConfig, model_path: str | None = None) -> dict[str, float]:
    """Evaluate a model on the evaluation split of ``config``.

    References come from where training takes them: they belong to the model that ``config`` names, not to the one that
    is evaluated. When ``model_path`` is the folder of a run, the result is also written there as ``evaluation.json``.

    Args:
        model_path: a model or adapter folder, or a Hub id; by default the model before training.

    Returns:
        ``eval_loss``, ``eval_rewards/*``, ``eval_logps/*``, ``eval_ranking_accuracy``,
        ``eval_ranking_accuracy_per_token``, ``eval_num_pairs``, and accuracies by length of the longest response.

    Raises:
        UserError: no evaluation data, or a model that cannot be loaded.
    """
    distributed.set_timeout(config.train.timeout_minutes)
    check_quantization(config.model)
    if model_path is not None:
        check_folder(model_path, "--model ")
    tokenizer = load_tokenizer(config.model)
    dataset, _ = load_dataset_groups(config.data, tokenizer, split="eval")
    _check_fits(dataset, config)
    device = resolve_device()
    policy = load_policy(config.model, device=device)
    adapter = model_path if model_path is not None and is_adapter(Path(model_path)) else None
    alone = adapter is not None and _changes_base(config.model, adapter)
    if adapter is not None and not alone:
        # Before the layers are sharded that it is in.
        put_adapter(policy, adapter)
    trained = policy = shard_policy(policy, device)
    if adapter is not None and alone:
        trained = _load_alone(config.model, adapter, device)
    elif model_path is not None and adapter is None:
        trained = load_trained(config.model, model_path, device)
    check_packing(policy, share_prompts=config.packing.share_prompts)
    check_dataset(policy, dataset)
    check_dataset(trained, dataset)
    objective = Objective(config.loss, token_metrics=config.train.token_metrics)
    objective.check_dataset(dataset)
    references = prepare_references(config, policy, objective, {"eval": dataset}, say=log.info)
    objective.live_reference = references.live
    values = evaluate_policy(trained, dataset, objective, config, lookup=references.lookup("eval"), progress=True)
    log.info(format_evaluation(values))
    if distributed.is_main() and model_path is not None and (Path(model_path) / METRICS_FILE).exists():
        write_evaluation(Path(model_path), values | _as_trained(Path(model_path), values), advice=_RERUN)
    return values


def put_adapter(base: Policy, model_path: str) -> None:
    """Put the adapter in folder ``model_path`` on a policy that is not sharded yet, whatever adapters that has.

    Raises:
        UserError: the adapter does not fit the base.
    """
    try:
        with shapes_alone():
            load_adapter(base, Path(model_path))
    except UserError as error:
        raise UserError(f"--model {model_path}: {error}") from error


def _changes_base(model: ModelConfig, adapter: str) -> bool:
    """Whether ``adapter`` and the reference cannot share one base, since one of them has changed it."""
    import_peft(f"--model {adapter}")
    own = model.adapter_name_or_path
    return changes_base(adapter) or (own is not None and changes_base(own))


def _load_alone(model: ModelConfig, adapter: str, device: torch.device) -> Policy:
    base = load_policy(replace(model, lora=None, adapter_name_or_path=None), device=device)
    put_adapter(base, adapter)
    return shard_policy(base, device)


def load_trained(model: ModelConfig, model_path: str, device: torch.device) -> Policy:
    """The full model at ``model_path``, sharded; ``model`` says how it is held, but for its adapters and quantization.

    Raises:
        UserError: the model cannot be loaded.
    """
    if model.trains_adapter:
        log.info("%s is a full model: the adapters and quantization of model are not applied", model_path)
    full = replace(full_model(model), model_name_or_path=model_path, revision=None)
    try:
        return shard_policy(load_policy(full, device=device), device)
    except UserError as error:
        raise UserError(f"--model {model_path}: {error}") from error


def evaluate_policy(
    policy: Policy,
    dataset: PreferenceDataset,
    objective: Objective,
    config: RunConfig,
    *,
    lookup: Callable[[Pack], np.ndarray] | None,
    progress: bool = False,
    stoppable: bool = True,
) -> dict[str, float]:
    """Metrics of ``policy`` on ``dataset``; the policy's training mode is restored.

    Losses that couple pairs are computed over the whole dataset at once.

    Args:
        lookup: stored reference log-probs of some groups; None for a live reference or none.
        stoppable: whether a request to end is heeded.

    Raises:
        Stopped: between two packs, on all ranks, when any process was asked to end.
    """
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            scores = _score_all(policy, dataset, objective, config, lookup, progress, stoppable)
    finally:
        policy.train(training)
    lengths = dataset.lengths
    per_group = tuple(lengths.responses.tolist())
    lengths_S = torch.from_numpy(np.concatenate([n[1:] for n in lengths]))
    places_P2 = pair_places(dataset) if dataset.has_pairs.any() else None
    pairs_P2 = None if places_P2 is None else torch.from_numpy(places_P2)
    scored = objective.score(scores.logps_S, scores.ref_S, lengths_S, per_group, pairs_P2, sums_SK=scores.sums_SK)
    names = PREFERENCE_NAMES + TOKEN_NAMES if objective.token_stats else PREFERENCE_NAMES
    values = dict(zip((f"eval_{n}" for n in names), scored.means().tolist(), strict=True))
    summed, per_token = _ranking(scores.logps_S, lengths_S, per_group)
    values["eval_ranking_accuracy"] = summed.mean().item()
    values["eval_ranking_accuracy_per_token"] = per_token.mean().item()
    values["eval_num_pairs"] = float(dataset.terms.sum())
    terms_G = torch.from_numpy(dataset.terms)
    right = summed.repeat_interleave(terms_G) if scores.ref_S is None else scored.accuracies
    return values | _by_length(right, torch.from_numpy(lengths.longest).repeat_interleave(terms_G))


def _score_all(
    policy: Policy,
    dataset: PreferenceDataset,
    objective: Objective,
    config: RunConfig,
    lookup: Callable[[Pack], np.ndarray] | None,
    progress: bool,
    stoppable: bool,
) -> _Scores:
    from tqdm.auto import tqdm

    packing = config.packing
    sizes = group_sizes(dataset.lengths, share_prompts=packing.share_prompts)
    packs = pack_groups(sizes, packing.tokens_per_pack)
    costs_G = group_costs(dataset.lengths, share_prompts=packing.share_prompts)
    costs = [int(costs_G[list(pack)].sum()) for pack in packs]
    share = distributed.own_share(costs)
    # Forward passes of a sharded model are joint: who has no pack left runs the cheapest one again.
    cheapest = costs.index(min(costs))
    own, columns = [], []
    quiet = True if not (progress and distributed.is_main()) else None
    for place in tqdm(share, desc="evaluation", unit="pack", disable=quiet):
        if stoppable:
            stop.check()
        pack = packs[cheapest if place is None else place]
        batch = build_batch([dataset[i] for i in pack], share_prompts=packing.share_prompts).to(policy.device)
        stored = None if lookup is None else to_device(torch.from_numpy(lookup(pack)), policy.device)
        logps_S, sums_SK = objective.score_responses(policy, batch)
        ref_S = objective.reference(batch, stored)
        if place is not None:
            own.append(pack)
            pair = torch.stack([logps_S, torch.zeros_like(logps_S) if ref_S is None else ref_S], 1)
            columns.append(torch.cat([pair, sums_SK], 1))
    rows_SC = torch.cat([torch.zeros(0, 2 + len(objective.token_stats)), *(rows.cpu() for rows in columns)])
    order = _response_order(dataset, [pack for packs in distributed.gather(own) for pack in packs])
    logps_S, ref_S, *sums = torch.cat(distributed.concat_over_ranks(rows_SC))[order].unbind(1)
    sums_SK = torch.stack(sums, 1) if sums else logps_S.new_zeros(len(logps_S), 0)
    return _Scores(logps_S, ref_S if objective.needs_reference else None, sums_SK)


def _response_order(dataset: PreferenceDataset, packs: list[Pack]) -> Tensor:
    """Where the responses of the dataset, in its order, are in the concatenated packs."""
    counts = dataset.lengths.responses
    first = np.concatenate([[0], np.cumsum(counts)])
    places = np.concatenate([np.arange(first[i], first[i + 1]) for pack in packs for i in pack])
    return torch.from_numpy(np.argsort(places, kind="stable"))


def _ranking(logps_S: Tensor, lengths_S: Tensor, per_group: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """fp32 [G] each: whether the best response has the higher log-prob than all others, summed and per token."""
    summed, averaged = [], []
    means_S = logps_S / lengths_S
    for logps, means in zip(logps_S.split(per_group), means_S.split(per_group), strict=True):
        summed.append((logps[0] > logps[1:]).all())
        averaged.append((means[0] > means[1:]).all())
    return torch.stack(summed).float(), torch.stack(averaged).float()


def _by_length(right: Tensor, longest: Tensor) -> dict[str, float]:
    """Accuracy, and number of pairs, by the tokens of the longest response of their group in powers of two.

    Args:
        right: of each pair or ranking: the accuracy of the rewards, or of the ranking for a loss without a reference.
    """
    right = right.double()
    values: dict[str, float] = {}
    low, high = 1, 32
    while low <= int(longest.max()):
        inside = (longest >= low) & (longest <= high)
        if inside.any():
            values[f"{BY_LENGTH}{low}-{high}"] = right[inside].mean().item()
            values[f"{PAIRS_BY_LENGTH}{low}-{high}"] = float(inside.sum())
        low, high = high + 1, high * 2
    return values


def scalar_metrics(values: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation without those by length: what a row of ``metrics.jsonl`` holds."""
    return {k: v for k, v in values.items() if not k.startswith((BY_LENGTH, PAIRS_BY_LENGTH))}


def write_evaluation(run_dir: Path, values: dict[str, float], *, advice: str = CONTINUE) -> None:
    """Write ``evaluation.json`` of a run folder; ``advice`` is for a disk that does not take it."""
    write_atomically(run_dir / EVALUATION_FILE, json.dumps(values, indent=1) + "\n", advice=advice)


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
    same = ("eval_num_pairs", "eval_logps/chosen", "eval_logps/rejected", "eval_loss")
    if not all(math.isclose(before.get(name, math.nan), values[name], rel_tol=_SAME_ROWS) for name in same):
        return {}
    return {name: value for name, value in before.items() if name.startswith(AS_TRAINED)}


def format_evaluation(values: dict[str, float]) -> str:
    """The table that ``dpo evaluate`` prints."""
    lines = [f"{name.removeprefix('eval_'):<30} {value:>12.6g}" for name, value in scalar_metrics(values).items()]
    lengths = [key.removeprefix(BY_LENGTH) for key in values if key.startswith(BY_LENGTH)]
    if lengths:
        lines += ["", f"{'tokens of the longest response':<30} {'accuracy':>12} {'pairs':>8}"]
        for bucket in lengths:
            count = values[f"{PAIRS_BY_LENGTH}{bucket}"]
            lines.append(f"{bucket:<30} {values[BY_LENGTH + bucket]:>12.4f} {count:>8.0f}")
    return "\n".join(lines)


def _check_fits(dataset: PreferenceDataset, config: RunConfig) -> None:
    check_fits(dataset, tokens_per_pack=config.packing.tokens_per_pack, share_prompts=config.packing.share_prompts)
