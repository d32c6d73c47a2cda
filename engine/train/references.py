"""Where a run's reference log-probs come from: the store, columns of the data, a live model, or nowhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..config.schema import ModelConfig, RunConfig
from ..data.groups import PreferenceDataset
from ..errors import UserError
from ..model import Policy, ready_policy
from ..model.adapter_forms import base_of_adapter
from ..model.sources import named_by
from ..packing import Pack, PackedBatch, build_batch
from ..reference import (
    ReferenceStore,
    default_store_path,
    identify,
    import_columns,
    load_ref_sums,
    load_weighted_sums,
    precompute,
    verify_rows,
    weights_digest,
)
from ..reference.columns import PAIR_COLUMNS
from ..reference.provenance import why_absent
from ..reference.verify import reward_bound
from .objective import Objective

PER_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest mean difference of a token's log-prob, in nats, that rounding may cause between two ways to compute it."""

Mode = Literal["stored", "live", "none"]


class ReferenceTable:
    """Reference log-prob sums of a dataset, one float32 per response."""

    def __init__(self, sums: Sequence[tuple[float, ...]]):
        self.sums = sums
        self._first = np.concatenate([[0], np.cumsum([len(s) for s in sums])]).astype(np.int64)
        self._flat = np.fromiter((value for s in sums for value in s), np.float32, int(self._first[-1]))

    def lookup(self, pack: Pack) -> np.ndarray:
        """float32 [S]: of the responses of some groups, in order."""
        return np.concatenate([self._flat[self._first[i] : self._first[i + 1]] for i in pack])


@dataclass
class References:
    """The references of one run."""

    mode: Mode
    source: str
    """For people: where they come from."""
    tables: dict[str, ReferenceTable]
    """By name of the dataset (``train``, ``eval``); empty unless stored."""
    live: Callable[[PackedBatch], Tensor] | None = None
    """fp32 [S] of a batch, without gradients."""
    weights: str | None = None
    """``weights_digest`` of a reference model that the configuration names."""
    moving: Policy | None = None
    """A live second model that training moves (``reference.sync_ref_model``)."""

    def move(self, policy: Policy, share: float) -> None:
        """reference = (1 - share) * reference + share * policy. TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656."""
        assert self.moving is not None
        with torch.no_grad():
            for old, new in zip(self.moving.parameters(), policy.parameters(), strict=True):
                old.mul_(1 - share).add_(new, alpha=share)

    def lookup(self, name: str) -> Callable[[Pack], np.ndarray] | None:
        return self.tables[name].lookup if name in self.tables else None

    def of_window(self, dataset: PreferenceDataset) -> Callable[[Pack], np.ndarray] | None:
        """As ``lookup`` of ``train``, for a later window of a stream."""
        if "train" not in self.tables:
            return None
        sums = import_columns(dataset)
        if sums is None:
            raise UserError(
                f"row {dataset[0].label} and those after it have no {' and '.join(PAIR_COLUMNS)}, while earlier rows "
                "of the stream have: fill the columns in every row, or leave them out with data.columns"
            )
        return ReferenceTable(sums).lookup


def resolve_mode(config: RunConfig, objective: Objective) -> Mode:
    """The mode that ``auto`` stands for, once it is clear that mode and loss fit.

    Raises:
        UserError: a loss without a reference and a mode that has one, or the reverse.
    """
    mode, loss = config.reference.mode, config.loss.loss_name
    if objective.needs_reference:
        if mode == "none":
            raise UserError(f"reference.mode none does not fit loss.loss_type {loss}, which compares with a reference")
        # Rows of a stream are read once, so nothing can be computed for them before training.
        live = mode == "live" or config.reference.sync_ref_model or (mode == "auto" and config.data.streaming)
        return "live" if live else "stored"
    if mode in ("stored", "live"):
        raise UserError(f"loss.loss_type {loss} has no reference: set reference.mode to none or auto, not {mode}")
    return "none"


def prepare_references(
    config: RunConfig,
    policy: Policy,
    objective: Objective,
    datasets: dict[str, PreferenceDataset],
    *,
    say: Callable[[str], None],
    progress: bool = True,
    base: str | None = None,
) -> References:
    """Make the references of every dataset available, before the first step.

    Args:
        policy: as it is before step 1.
        datasets: by name.
        base: ``weights_digest`` of the policy, where that is known.
        say: told what is computed and used.

    Raises:
        UserError: rows are missing in mode ``stored``, or a stored row does not match the model.
    """
    mode = resolve_mode(config, objective)
    if mode == "none":
        return References("none", "none: the loss has no reference", {})
    streams = config.data.streaming and "train" in datasets
    has_columns = streams and import_columns(datasets["train"]) is not None
    if mode == "stored" and streams and not has_columns:
        raise UserError(
            "reference.mode stored: rows of data.streaming are in no store before they are read: set reference.mode to "
            "auto or live, or give the rows columns ref_chosen_logps and ref_rejected_logps"
        )
    if mode == "live" and not (has_columns and config.reference.mode == "auto" and not config.reference.sync_ref_model):
        return _live_references(config, objective, policy, datasets, say)
    columns = {name: import_columns(dataset) for name, dataset in datasets.items()}
    for name, sums in columns.items():
        what = "loss.ld_alpha weighs" if objective.ld_alpha is not None else "rows with a mask or weights weigh"
        if sums is not None and (objective.ld_alpha is not None or datasets[name].weighs_tokens):
            raise UserError(
                f"{what} single tokens, and columns of reference log-probs hold sums: leave the columns out with "
                "data.columns: {ref_chosen_logps: null, ref_rejected_logps: null} to have the log-probs computed"
            )
    tables = {name: ReferenceTable(sums) for name, sums in columns.items() if sums is not None}
    own = config.reference.model_name_or_path is None
    reference = policy if own else load_reference(config, policy.device, list(datasets.values()))
    weights = base if own else weights_digest(reference)
    options: dict[str, Any] = {"beta": config.loss.beta, "share_prompts": config.packing.share_prompts}
    for name, dataset in datasets.items():
        if name in tables:
            verify_rows(reference, dataset, tables[name].sums, **options)
    absent = {name: dataset for name, dataset in datasets.items() if name not in tables}
    sources = []
    if tables:
        sources.append(f"columns of the {' and '.join(tables)} data")
    if absent:
        store = ReferenceStore(config.reference.store or default_store_path())
        sources.append(f"store {store.path}")
        tables |= _stored_tables(config, objective, (reference, weights), absent, store, say, progress)
    return References("stored", ", ".join(sources), tables, weights=None if own else weights)


def _stored_tables(
    config: RunConfig,
    objective: Objective,
    model: tuple[Policy, str | None],
    datasets: dict[str, PreferenceDataset],
    store: ReferenceStore,
    say: Callable[[str], None],
    progress: bool,
) -> dict[str, ReferenceTable]:
    """Of a model, whose ``weights_digest`` may be known."""
    reference, weights = model
    identity = identify(reference, weights)
    options: dict[str, Any] = {"beta": config.loss.beta, "share_prompts": config.packing.share_prompts}
    tables = {}
    for name, dataset in datasets.items():
        if config.reference.mode == "auto":
            report = precompute(
                reference,
                dataset,
                store,
                tokens_per_pack=config.packs.tokens_per_pack,
                share_prompts=config.packing.share_prompts,
                identity=identity,
                progress=progress,
            )
            say(f"reference log-probs ({name}): {report}")
        elif distributed.is_main() and (why := why_absent(store, identity)) is not None:
            say(f"reference log-probs: {why}")
        sums = load_ref_sums(dataset, store, identity.digest) if distributed.is_main() else []
        sums = distributed.broadcast(sums)
        verify_rows(reference, dataset, sums, **options)
        if objective.ld_alpha is not None or dataset.weighs_tokens:
            own, given = distributed.is_main(), {"ld_alpha": objective.ld_alpha}
            sums = distributed.broadcast(load_weighted_sums(dataset, store, identity.digest, **given) if own else [])
        tables[name] = ReferenceTable(sums)
    return tables


def reference_model(config: RunConfig) -> ModelConfig:
    """The reference model's configuration: the model before training, unless another is named.

    A fresh adapter is no part of the reference, a trained one that goes on is. An adapter that is named is meant on the
    base that it names itself.
    """
    name = config.reference.model_name_or_path
    if name is None:
        return replace(config.model, lora=None)
    full = replace(full_model(config.model), model_name_or_path=name, revision=None)
    found = base_of_adapter(name)
    if found is None:
        return full
    base, revision = found
    return replace(full, model_name_or_path=base, revision=revision, adapter_name_or_path=name)


def full_model(model: ModelConfig) -> ModelConfig:
    """``model`` without adapters and quantization."""
    return replace(model, lora=None, adapter_name_or_path=None, quantization=None)


def load_reference(config: RunConfig, device: torch.device, datasets: Sequence[PreferenceDataset]) -> Policy:
    """The reference model beside the trained one, ready for the packs of ``datasets``.

    Raises:
        UserError: the model cannot be loaded, or used on them.
    """
    model, name = reference_model(config), config.reference.model_name_or_path
    with named_by("reference.model_name_or_path=", name):
        return ready_policy(model, device, datasets, packing=config.packing, weights_dtype=config.optim.weights_dtype)


def _live_references(
    config: RunConfig,
    objective: Objective,
    policy: Policy,
    datasets: dict[str, PreferenceDataset],
    say: Callable[[str], None],
) -> References:
    other = config.reference.model_name_or_path
    if policy.has_adapter and other is None:
        how = "its adapters off" if policy.reference_adapter is None else "the frozen copy of its adapter"
        return References("live", f"live: the model with {how}", {}, live=lambda b: _live_sums(policy, b, objective))
    frozen = load_reference(config, policy.device, list(datasets.values()))
    frozen.requires_grad_(False)
    frozen.eval()
    name = other or config.model.model_name_or_path
    weights = None if other is None else weights_digest(frozen)
    moves = config.reference.sync_ref_model
    if moves:
        _check_same_shape(frozen, policy, name)
        if any(group.ref_logps is not None for dataset in datasets.values() for group in dataset):
            say("columns of reference log-probs are not read: reference.sync_ref_model moves the reference")
    return References(
        "live",
        f"live: {_second_model_words(config)}, {name}",
        {},
        live=lambda b: _live_sums(frozen, b, objective),
        weights=weights,
        moving=frozen if moves else None,
    )


def _second_model_words(config: RunConfig) -> str:
    r = config.reference
    if not r.sync_ref_model:
        return "a frozen second model"
    share, steps = r.ref_model_mixup_alpha, r.ref_model_sync_steps
    return f"a second model, moved towards the policy by {share:g} every {steps:,} steps"


def _check_same_shape(reference: Policy, policy: Policy, name: str) -> None:
    """Raise a ``UserError`` unless the weights of two models can be mixed."""
    ours, theirs = ({n: (p.shape, p.dtype) for n, p in m.model.named_parameters()} for m in (policy, reference))
    if ours != theirs:
        raise UserError(
            f"reference.sync_ref_model mixes weights, and those of reference.model_name_or_path={name} are not those "
            "of the trained model by name and shape: name another, or set reference.sync_ref_model to false"
        )


def _live_sums(policy: Policy, batch: PackedBatch, objective: Objective) -> Tensor:
    with policy.reference_mode(), torch.no_grad():
        return objective.response_logps(policy.logps(batch), batch)


def check_first_loss(
    policy: Policy, dataset: PreferenceDataset, table: ReferenceTable, objective: Objective, *, rows: int = 4
) -> float:
    """The mean sigmoid loss of the shortest rows before step 1: ln 2 when the policy, as it trains, is its reference.

    Args:
        policy: with its fresh adapters on, if it has any.

    Raises:
        UserError: the loss is another one, by more than rounding explains.
    """
    lengths, beta = dataset.lengths, objective.config.beta
    shortest = np.argsort(lengths.packed(share_prompts=True), kind="stable")[:rows].tolist()
    share = not policy.layout.in_rows
    batch = build_batch([dataset[i] for i in shortest], share_prompts=share).to(policy.device)
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            logps_S = objective.response_logps(policy.logps(batch), batch).cpu()
    finally:
        policy.train(training)
    ratios_S = logps_S - torch.from_numpy(table.lookup(tuple(shortest)))
    first = torch.tensor(batch.responses_per_group[:-1], dtype=torch.long).cumsum(0)
    best = torch.cat([torch.zeros(1, dtype=torch.long), first])
    # A response alone is compared with nothing.
    others = ratios_S[best + 1] if min(batch.responses_per_group) > 1 else 0.0
    margins = beta * (ratios_S[best] - others)
    loss = -torch.nn.functional.logsigmoid(margins).mean().item()
    tokens = max(int(lengths[i][1:3].sum()) for i in shortest)
    distance = abs(loss - math.log(2))
    # The loss moves by half of a margin, so by no more than a reward.
    bound = reward_bound(policy, dataset, shortest, distance, beta=beta, share_prompts=share)
    allowed = min(1e-6 + beta * tokens * PER_TOKEN[policy.compute_dtype], bound)
    if not distance <= allowed:
        raise UserError(
            f"start-up check: the sigmoid loss of rows {', '.join(str(r) for r in batch.rows)} is {loss:.6f} before "
            f"step 1, not ln 2 = {math.log(2):.6f} (allowed distance {allowed:.2g}): the policy is not the model that "
            "the reference log-probs belong to; set reference.store to a new folder, or name the reference model in "
            "reference.model_name_or_path"
        )
    return loss
