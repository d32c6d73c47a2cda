"""What each ``dpo`` command does. Heavy modules are imported inside, so that ``dpo --help`` stays fast."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import distributed
from .config import load_config
from .config.schema import RunConfig
from .errors import UserError

is_whole_process = False
"""Whether the process ends with the command, so that what it leaves out is missed by nobody."""


def _begin(options: Namespace, overrides: Sequence[str], loads: str = "torch and transformers") -> RunConfig:
    """The configuration of a command; and a first line, since what it imports next takes seconds."""
    config = load_config(options.config, overrides)
    if os.environ.get("RANK", "0") == "0":
        print(f"dpo {options.command} {options.config}: loading {loads}", file=sys.stderr, flush=True)
    return config


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a process's command: what they make is not searched for garbage, here or later.

    Modules live as long as the process. To go through their objects again and again while more are imported, and later
    while rows and steps make others, took a fifth of the time until the first step.
    """
    if not (is_whole_process and gc.isenabled()):
        # A program of the user's may have objects that it wants to be rid of.
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def demo(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo demo``"""
    from .demo import run_demo

    run_demo(options.output, options.dispatch)
    return 0


def init(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo init``"""
    from .config.init import write_converted, write_template

    if options.from_file is None:
        if options.num_processes is not None:
            raise UserError("--num-processes is of use only with --from FILE")
        write_template(options.output)
        print(f"wrote {options.output}; edit it, then run `dpo check {options.output}`")
        return 0
    conversion = write_converted(options.from_file, options.output, num_processes=options.num_processes)
    print(conversion.report())
    print(f"\nwrote {options.output}; read it, then run `dpo check {options.output}`")
    return 0


def check(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo check``"""
    config = _begin(options, overrides, "transformers")
    with importing():
        from .model.tokenizer import leave_activations_out, leave_torch_out

        # Code of a model's own may ask for anything.
        if is_whole_process and not config.model.trust_remote_code:
            leave_torch_out()
        leave_activations_out()
        from .check import check

    found = check(config)
    print(found.text)
    return 2 if found.obstacles else 0


def plan(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo plan``"""
    config = _begin(options, overrides)
    with importing():
        from .inputs import check_inputs
        from .model import load_tokenizer
        from .train.training_data import read_training_rows

    check_inputs(config, splits=("train",), tokenizer_only=True)
    dataset, report = read_training_rows(config, load_tokenizer(config.model))
    if config.data.streaming:
        print(f"a stream: figures are of its first window, {len(dataset):,} rows\n")
    if report.dropped:
        print(f"{report.dropped:,} of {report.total:,} rows are dropped; `dpo check {options.config}` says why\n")
    # After the data: what is read counts as memory of the process.
    with importing():
        from .forecast import Target, describe_forecast
        from .train.mismatched import loss_groups

    target = Target.of_kind(options.device or ("cuda" if options.memory else None), options.processes)
    groups = loss_groups(config, dataset, split="train")
    print(describe_forecast(groups, config, target, room=options.memory))
    return 0


def precompute(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo precompute``"""
    config = _begin(options, overrides)
    with importing():
        from .precompute import check_columns, check_settings, fill_store

    check_settings(config, options.export)
    if options.import_columns:
        check_columns(config)
    else:
        fill_store(config, options.export)
    return 0


def train(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo train``"""
    config = _begin(options, overrides)
    with importing():
        from .forecast.advice import KnownRun
        from .train.loop import train

    known = KnownRun(config)
    train(config, resume=options.resume, on_data=known.take, forecast=known.told)
    return 0


def sweep(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo sweep``"""
    from .config.sweep import load_sweep

    runs = load_sweep(options.config, overrides)
    if distributed.is_main():
        head = f"dpo sweep {options.config}: {len(runs)} runs"
        print(f"{head}; loading torch and transformers", file=sys.stderr, flush=True)
    with importing():
        from .sweep import sweep

    distributed.say(str(sweep(runs)))
    return 0


def evaluate(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo evaluate``"""
    config = _begin(options, overrides)
    with importing():
        from .evaluate import evaluate

    own_loss = any(word.startswith("--loss.") for word in overrides)
    evaluate(config, options.model, own_loss=own_loss, samples=options.samples)
    return 0


def merge(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo merge``"""
    with importing():
        from .merge import merge

    merged = merge(options.source, options.output, base=options.base, dtype=options.dtype)
    dtype = str(merged.dtype).removeprefix("torch.")
    print(
        f"the merged model, in {dtype}, is {merged.folder}: log-probs of random tokens move by {merged.moved:.2g} nats"
    )
    if dtype != "float32" and merged.moved > 0:
        print(f"{dtype} rounds small updates of the adapter away, and rewards with them; --dtype float32 keeps them")
    return 0


def push(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo push``"""
    from .push import push

    print(push(options.source, options.repo_id, private=options.private, revision=options.revision))
    return 0


def report(options: Namespace, overrides: Sequence[str]) -> int:
    """``dpo report``"""
    with importing():
        from .report import write_comparison, write_report

    if len(options.run_dirs) > 1:
        print(write_comparison(options.run_dirs, options.output))
    elif options.output is not None:
        raise UserError("--output is the page of several runs: one run has its own in its folder, report/index.html")
    else:
        print(write_report(*options.run_dirs))
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
    publish = "--publish" in options.pytest_args
    results = folder / "results" if publish else Path(tempfile.mkdtemp(prefix="dpo-bench-"))
    passed = [argument for argument in options.pytest_args if argument != "--publish"]
    command = [sys.executable, "-m", "pytest", str(folder), *passed]
    code = subprocess.call(command, cwd=folder.parent, env={**os.environ, "DPO_BENCH_RESULTS": str(results)})
    tables = sorted(results.rglob("*.md"))
    if publish:
        print(f"results are in {results}, which the repository holds: look at `git diff` before you commit them")
    elif tables:
        print(f"results, in {results} (--publish writes them to {folder / 'results'}):")
        print("\n".join(f"  {table.relative_to(results)}" for table in tables))
    else:
        results.rmdir()
        print("no results were written")
    return code


def _tune(arguments: Sequence[str]) -> int:
    from dpo_kernels.tuning.command import run
    from dpo_kernels.tuning.errors import TuningError

    try:
        return run(arguments, prog="dpo bench tune")
    except TuningError as error:
        raise UserError(str(error)) from error
