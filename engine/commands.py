"""What each ``dpo`` command does. Heavy modules are imported inside, so that ``dpo --help`` stays fast."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from . import distributed
from .config import load_config
from .config.schema import REFERENCE_FREE_LOSSES, RunConfig
from .errors import UserError

if TYPE_CHECKING:
    from .data.groups import PreferenceDataset
    from .model import Policy
    from .reference import ReferenceStore
    from .reference.keys import ModelIdentity

VERIFIED_ROWS = 256
"""Rows that ``dpo precompute --import-columns`` recomputes."""


def demo(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo demo``"""
    from .demo import run_demo

    run_demo(options.output)
    return 0


def init(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo init``"""
    from .config.init import write_converted, write_template

    if options.from_trl is None:
        if options.num_processes is not None:
            raise UserError("--num-processes is of use only with --from-trl FILE")
        write_template(options.output)
        print(f"wrote {options.output}; edit it, then run `dpo check {options.output}`")
        return 0
    conversion = write_converted(options.from_trl, options.output, num_processes=options.num_processes)
    print(conversion.report())
    print(f"\nwrote {options.output}; read it, then run `dpo check {options.output}`")
    return 0


def check(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo check``"""
    config = load_config(options.config, overrides)
    from .check import check

    found = check(config)
    print(found.text)
    return 2 if found.obstacles else 0


def plan(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo plan``"""
    config = load_config(options.config, overrides)
    from .data import load_dataset_groups
    from .model import load_tokenizer

    dataset, report = load_dataset_groups(config.data, load_tokenizer(config.model), split="train")
    if report.dropped:
        print(f"{report.dropped:,} of {report.total:,} rows are dropped; `dpo check {options.config}` says why\n")
    # After the data: what is read counts as memory of the process.
    from .forecast import describe_forecast

    print(describe_forecast(dataset, config))
    return 0


def precompute(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo precompute``"""
    config = load_config(options.config, overrides)
    from .data import open_rows
    from .model.quantization import check_quantization
    from .reference.columns import check_export_path, check_export_row
    from .train.references import reference_model

    distributed.set_timeout(config.train.timeout_minutes)
    check_quantization(reference_model(config))
    if options.export is not None and distributed.is_main():
        check_export_path(options.export)
        for row in islice(open_rows(config.data, split="train"), 1):
            check_export_row(row)
    from .forecast.advice import memory_errors

    with memory_errors(config):
        return _precompute(config, options)


def _precompute(config: RunConfig, options: Namespace) -> int:
    from .reference import ReferenceStore, default_store_path, identify

    datasets = _datasets(config)
    if options.import_columns:
        _verify_columns(config, datasets)
        return 0
    reference = _reference_policy(config, datasets)
    identity = identify(reference)
    store = ReferenceStore(config.reference.store or default_store_path())
    for name, dataset in datasets.items():
        _fill(config, reference, identity, store, name, dataset)
    distributed.say(f"stored in {store.path}")
    if options.export is not None and distributed.is_main():
        _export(config, options.export, datasets["train"], store, identity.digest)
    return 0


def train(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo train``"""
    config = load_config(options.config, overrides)
    from .train.loop import train

    train(config, resume=options.resume)
    return 0


def evaluate(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo evaluate``"""
    config = load_config(options.config, overrides)
    from .evaluate import evaluate
    from .forecast.advice import memory_errors

    with memory_errors(config):
        evaluate(config, options.model)
    return 0


def report(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo report``"""
    from .report import write_report

    print(write_report(options.run_dir))
    return 0


def doctor(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo doctor``"""
    from .doctor import diagnose

    text, healthy = diagnose()
    print(text)
    return 0 if healthy else 1


def bench(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo bench``"""
    if options.pytest_args[:1] == ["tune"]:
        return _tune(options.pytest_args[1:])
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not folder.is_dir():
        raise UserError("the benchmarks are not part of the installed package; run `dpo bench` from a source checkout")
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the benchmarks need {' and '.join(missing)}: pip install 'dpo-kernels[bench]'")
    command = [sys.executable, "-m", "pytest", str(folder), *options.pytest_args]
    return subprocess.call(command, cwd=folder.parent)


def _tune(arguments: Sequence[str]) -> int:
    from dpo_kernels.tuning.command import TuningError, run

    try:
        return run(arguments, prog="dpo bench tune")
    except TuningError as error:
        raise UserError(str(error)) from error


def _datasets(config: RunConfig) -> dict[str, PreferenceDataset]:
    from .data import load_dataset_groups
    from .model import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    datasets = {"train": load_dataset_groups(config.data, tokenizer, split="train")[0]}
    if config.data.eval_dataset_name is not None:
        datasets["eval"] = load_dataset_groups(config.data, tokenizer, split="eval")[0]
    return datasets


def _reference_policy(config: RunConfig, datasets: dict[str, PreferenceDataset]) -> Policy:
    """The reference exactly as training loads it, so that both find the same rows of the store."""
    from .model import check_dataset, check_packing, load_policy, resolve_device, shard_policy
    from .reference import check_fresh, score_fresh
    from .train.references import load_reference

    if REFERENCE_FREE_LOSSES.issuperset(config.loss.loss_types):
        raise UserError(f"loss.loss_type {config.loss.loss_name} needs no reference; there is nothing to compute")
    device = resolve_device()
    own = config.reference.model_name_or_path is None
    fresh = score_fresh(config.model, datasets["train"], device) if own else None
    policy = (
        shard_policy(load_policy(config.model, device=device), device)
        if own
        else load_reference(config, device, datasets["train"])
    )
    distributed.say(f"attention: {policy.backend.name} ({policy.backend.reason})")
    check_packing(policy, share_prompts=config.packing.share_prompts)
    for dataset in datasets.values():
        check_dataset(policy, dataset)
    check_fresh(policy, fresh)
    return policy


def _fill(
    config: RunConfig,
    reference: Policy,
    identity: ModelIdentity,
    store: ReferenceStore,
    name: str,
    dataset: PreferenceDataset,
) -> None:
    from .reference import import_columns, precompute

    if import_columns(dataset) is not None:
        distributed.say(
            f"{name}: the rows have reference columns, and training uses those; --import-columns checks them"
        )
        return
    result = precompute(
        reference,
        dataset,
        store,
        tokens_per_pack=config.packing.tokens_per_pack,
        share_prompts=config.packing.share_prompts,
        identity=identity,
    )
    distributed.say(f"{name}: {result}")


def _verify_columns(config: RunConfig, datasets: dict[str, PreferenceDataset]) -> None:
    from .reference import import_columns, verify_rows

    found = {name: sums for name, dataset in datasets.items() if (sums := import_columns(dataset)) is not None}
    if not found:
        raise UserError(f"{config.data.dataset_name} has no columns ref_chosen_logps and ref_rejected_logps")
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


def _export(config: RunConfig, path: Path, dataset: PreferenceDataset, store: ReferenceStore, digest: str) -> None:
    from .data import open_rows
    from .reference import export_columns, import_columns, load_ref_sums

    sums = import_columns(dataset) or load_ref_sums(dataset, store, digest)
    written, left_out = export_columns(path, open_rows(config.data, split="train"), dataset, sums)
    dropped = f"; left out {left_out:,} that training drops" if left_out else ""
    print(f"wrote {written:,} rows to {path}{dropped}")
