"""``dpo precompute``: the reference log-probs of all rows, into the store, checked, or into a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from . import distributed
from .config.losses import REFERENCE_FREE_LOSSES
from .config.schema import RunConfig
from .data import load_dataset_groups
from .data.groups import PreferenceDataset
from .data.sets import DataSet, sets_of
from .errors import UserError
from .inputs import check_inputs
from .memory_errors import advised
from .model import Policy, load_tokenizer, ready_policy, resolve_device
from .model.division import divide_work
from .model.kernels.choice import kernels_words
from .model.layouts import attention_words, describe_layout
from .model.quantization import check_quantization
from .reference import (
    ReferenceStore,
    default_store_path,
    export_columns,
    identify,
    import_columns,
    load_ref_sums,
    precompute,
    verify_rows,
)
from .reference.columns import check_export_path, check_export_row
from .reference.keys import ModelIdentity
from .reference.template_date import with_template_date
from .train.mismatched import loss_groups
from .train.references import load_reference, reference_model

VERIFIED_ROWS = 256
"""Rows that ``check_columns`` recomputes."""


def check_settings(config: RunConfig, export: Path | None) -> None:
    """What can be said before anything is loaded.

    Raises:
        UserError: settings that cannot run, or a file that the rows cannot be exported to.
    """
    distributed.set_timeout(config.train.timeout_minutes)
    divide_work(config)
    check_quantization(reference_model(config))
    check_inputs(config)
    if export is not None and config.loss.ld_alpha not in (None, 1):
        raise UserError(
            "--export writes sums over responses, and loss.ld_alpha weighs single tokens: set it to null for an export"
        )
    if export is not None and config.loss.unpaired:
        raise UserError(
            f"--export writes columns of pairs and rankings, and loss.loss_type {config.loss.loss_name} takes rows: "
            "share the folder of reference.store instead"
        )
    if export is not None and distributed.is_main():
        for one, path in _exported(config, export):
            check_export_path(path)
            for row in islice(one.open(), 1):
                check_export_row(row)


@advised
def fill_store(config: RunConfig, export: Path | None = None) -> None:
    """Compute and store what is not stored yet of the training data and, where it is set, the evaluation data.

    Args:
        export: file to write the training rows to, with their reference columns; of a mixture, one for each set, whole.

    Raises:
        UserError: whatever the user can correct.
    """
    if config.data.streaming:
        raise UserError(
            "data.streaming computes references while training, so there is nothing to compute before: set it to false "
            "to fill a store from the whole set"
        )
    tokenizer = load_tokenizer(config.model)
    config = with_template_date(config, tokenizer)
    datasets = _datasets(config, tokenizer, whole=export is not None)
    reference = _reference_policy(config, datasets)
    identity = identify(reference)
    store = ReferenceStore(config.reference.store or default_store_path())
    for name, dataset in datasets.items():
        _fill(config, reference, identity, store, name, dataset)
    distributed.say(f"stored in {store.path}")
    if export is not None and distributed.is_main():
        _export(config, export, datasets["train"], store, identity.digest)


@advised
def check_columns(config: RunConfig) -> None:
    """Recompute some rows of each dataset that has reference columns.

    Raises:
        UserError: no dataset has any, or they are not those of the reference model.
    """
    tokenizer = load_tokenizer(config.model)
    config = with_template_date(config, tokenizer)
    datasets = _datasets(config, tokenizer)
    found = {name: sums for name, dataset in datasets.items() if (sums := import_columns(dataset)) is not None}
    if not found:
        raise UserError(f"{', '.join(config.data.names)} has no columns ref_chosen_logps and ref_rejected_logps")
    reference = _reference_policy(config, datasets)
    for name, sums in found.items():
        count = min(len(datasets[name]), VERIFIED_ROWS)
        verify_rows(
            reference,
            datasets[name],
            sums,
            count=count,
            beta=config.loss.beta,
            share_prompts=config.packing.share_prompts,
        )
        distributed.say(f"{name}: the reference columns fit the model ({count:,} rows recomputed); training uses them")


def _datasets(config: RunConfig, tokenizer: Any, *, whole: bool = False) -> dict[str, PreferenceDataset]:
    datasets = {}
    for split in ("train", *config.data.eval_splits):
        dataset, _ = load_dataset_groups(config.data, tokenizer, split=split, unpair=config.loss.unpaired)
        # What an epoch takes of an exported set is to stay what it is.
        datasets[split] = dataset if whole and split == "train" else loss_groups(config, dataset, split=split)
    return datasets


def _reference_policy(config: RunConfig, datasets: dict[str, PreferenceDataset]) -> Policy:
    """The reference exactly as training loads it, so that both find the same rows of the store."""
    if REFERENCE_FREE_LOSSES.issuperset(config.loss.loss_types):
        raise UserError(f"loss.loss_type {config.loss.loss_name} needs no reference; there is nothing to compute")
    if config.reference.sync_ref_model:
        raise UserError("reference.sync_ref_model moves the reference in training; there is nothing to compute before")
    device, rows = resolve_device(), list(datasets.values())
    if config.reference.model_name_or_path is not None:
        policy = load_reference(config, device, rows)
    else:
        policy = ready_policy(
            config.model, device, rows, packing=config.packing, weights_dtype=config.optim.weights_dtype
        )
    distributed.say(f"attention: {attention_words(policy)}")
    distributed.say(f"kernels: {kernels_words(policy)}")
    distributed.say(f"layout: {describe_layout(policy)}")
    return policy


def _fill(
    config: RunConfig,
    reference: Policy,
    identity: ModelIdentity,
    store: ReferenceStore,
    name: str,
    dataset: PreferenceDataset,
) -> None:
    if import_columns(dataset) is not None:
        distributed.say(
            f"{name}: the rows have reference columns, and training uses those; --import-columns checks them"
        )
        return
    result = precompute(
        reference,
        dataset,
        store,
        tokens_per_pack=config.packs.tokens_per_pack,
        share_prompts=config.packing.share_prompts,
        identity=identity,
    )
    distributed.say(f"{name}: {result}")


def _exported(config: RunConfig, path: Path) -> list[tuple[DataSet, Path]]:
    """The sets that are trained on, and the file that the rows of each are written to."""
    sets = sets_of(config.data, "train")
    stem, dot, extension = path.name.partition(".")
    return [(one, path.with_name(f"{stem}-{one.label}{dot}{extension}") if one.label else path) for one in sets]


def _export(config: RunConfig, path: Path, dataset: PreferenceDataset, store: ReferenceStore, digest: str) -> None:
    sums = import_columns(dataset) or load_ref_sums(dataset, store, digest)
    for one, file in _exported(config, path):
        places = [i for i, group in enumerate(dataset) if group.source == one.label]
        groups, of_set = [dataset[i] for i in places], [sums[i] for i in places]
        written, left_out = export_columns(file, one.open(), groups, of_set)
        dropped = f"; left out {left_out:,} that training drops" if left_out else ""
        print(f"wrote {written:,} rows to {file}{dropped}")
