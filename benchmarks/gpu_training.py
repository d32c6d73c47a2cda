"""Speed of training on a CUDA machine: whole steps at shapes of a large model's layers, and ``dpo train``.

Legend: T packed tokens.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cuda import no_wait
from benchmarks.gpu_engine import backends, build_policy, fuse, random_groups, step_of_groups
from benchmarks.gpu_numbers import profile
from benchmarks.gpu_table import Check, Context, SkippedError, first_line

PAIRS_PER_STEP = 64
LEARNING_RATE = 1e-5
LAYERS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
DRY_LAYERS = {**LAYERS, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
DRY_LAYERS |= {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}
JOB = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 12}
TINY_JOB = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 8
STEPS_SECONDS = 6.0
"""Longer steps are fewer, of which at least three."""


def training_checks(context: Context) -> Iterator[Check]:
    """The backend that would be chosen, then each of them, then other ways to train."""
    ways: dict[str, dict[str, Any]] = {"full, auto": {}, "LoRA, auto": {"lora": {"r": 16}}}
    ways |= {f"full, {name}": {"attention": name} for name in backends()}
    ways["gradient checkpointing, auto"] = {"checkpointing": True}
    for name, options in ways.items():
        yield Check(f"steps: {name}", partial(measure_steps, context, options), seconds=60)
    yield Check("profile of a step", partial(_profile_step, context), seconds=60)
    yield Check("dpo train", partial(_train_command, context), seconds=120)
    if not context.quick:
        yield Check("beside TRL", partial(_beside_trl, context), seconds=200)
        yield Check("dpo demo", partial(_demo, context), seconds=120)


class _Steps:
    """A policy at these shapes, one full pack, and what a step of it needs."""

    def __init__(self, context: Context, options: dict[str, Any], layers: dict[str, Any] | None = None):
        from engine.config.schema import LossConfig, OptimConfig
        from engine.errors import UserError
        from engine.train.objective import Objective
        from engine.train.optimizer import GuardedUpdate, build_optimizer, build_schedule

        layers = DRY_LAYERS if context.dry_run else layers or LAYERS
        prompt, response, count = (5, 4, 2) if context.dry_run else (384, 320, 16)
        model = {name: value for name, value in options.items() if name not in ("optim", "activation_offload")}
        optim = OptimConfig(**options.get("optim", {}))
        self.policy = build_policy(context, layers, "bfloat16", weights_dtype=optim.weights_dtype, **model)
        self.policy.activation_offload = options.get("activation_offload", False)
        fuse(context, self.policy, options.get("kernels", "none"))
        self.objective = Objective(LossConfig())
        sizes: dict[str, Any] = {"prompt": (prompt, prompt + 1), "response": (response, response + 1)}
        groups = random_groups(count, **sizes, responses=2, vocab=layers["vocab_size"])
        self.step = step_of_groups(groups, self.objective, context.device)
        self.batch = self.step.packs[0].batch
        try:
            optimizer, _ = build_optimizer(self.policy.model, optim)
        except UserError as reason:
            raise SkippedError(str(reason)) from reason
        self.update = GuardedUpdate(optimizer, build_schedule(optimizer, optim, total_steps=100), max_grad_norm=1.0)
        triangle = prompt * (prompt + 1) // 2
        self.visible = count * (triangle + 2 * (prompt * response + response * (response + 1) // 2))

    def run(self) -> None:
        self.update.step(self.objective.backward(self.policy, self.step).losses.mean())


def measure_steps(context: Context, options: dict[str, Any], layers: dict[str, Any] | None = None) -> dict[str, Any]:
    """Tokens per second, the share of the peak rate of products, memory; and whether a step waits for the device."""
    from engine.train.throughput import FlopModel, measure_matmul_rate, peak_memory_gib, reset_peak_memory

    peak = measure_matmul_rate(context.device, context.dtype)
    reset_peak_memory(context.device)
    steps = _Steps(context, options, layers)
    for _ in range(2):
        steps.run()
    times: list[float] = []
    most = 2 if context.dry_run else STEPS
    while len(times) < most and (len(times) < 3 or sum(times) < STEPS_SECONDS):
        context.synchronize()
        start = time.perf_counter()
        steps.run()
        context.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    tokens, completions = steps.batch.num_tokens, len(steps.batch.labels_N)
    flop = FlopModel.of(steps.policy).step(tokens, completions, steps.visible)
    columns = {
        "ms": 1e3 * seconds,
        "tokens per second": tokens / seconds,
        "mfu": flop / seconds / peak,
        "flop per second": flop / seconds,
        "floor, ms": 1e3 * flop / peak,
        "peak GiB": peak_memory_gib(context.device),
        "backend": steps.policy.backend.name,
        "note": f"{tokens} tokens, products at {peak / 1e12:.3g} TFLOP/s",
    }
    try:
        with no_wait(context):
            steps.run()
        columns["waits for the device"] = "no"
    except RuntimeError as error:
        columns["waits for the device"] = first_line(error)
    # Some optimizers take no verdict on the device, so the host asks for it in every step.
    waits = columns["waits for the device"] != "no" and (steps.update.deferred or context.dry_run)
    return {"ok": not waits and steps.update.ok(), **columns}


def _profile_step(context: Context) -> dict[str, Any]:
    return profile(context, _Steps(context, {}).run, "a training step", runs=2)


def _train_command(context: Context) -> dict[str, Any]:
    """``dpo train`` on a generated model and generated pairs: tokens per second, and where the loss went."""
    with tempfile.TemporaryDirectory() as scratch:
        model = save_job(Path(scratch), tiny=context.dry_run)
        return {**_train_ours(context, Path(scratch)), "note": model}


def _train_ours(context: Context, folder: Path) -> dict[str, Any]:
    try:
        from engine.config.load import build_config
        from engine.train.loop import train
    except ImportError as error:
        raise SkippedError(f"the engine does not import here: {first_line(error)}") from error
    config = build_config(
        {
            "model": {"model_name_or_path": str(folder / "model"), "dtype": context.dtype_name},
            "data": {"dataset_name": str(folder / "pairs.jsonl"), "max_length": 1024},
            "packing": {"pairs_per_step": _pairs_per_step(context), "tokens_per_pack": 16384},
            "optim": {"learning_rate": LEARNING_RATE},
            "reference": {"store": str(folder / "store")},
            "train": {"output_dir": str(folder / "run"), "logging_steps": 1, "report_to": [], "save_steps": None},
        },
        "benchmark",
    )
    start = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("perf/tokens_per_second", "perf/pairs_per_second", "perf/mfu", "perf/shared_fraction")
    columns: dict[str, Any] = {name: statistics.median(row[name] for row in _steady(rows)) for name in names}
    columns |= {"steps": result.steps, "peak GiB": rows[-1]["perf/peak_memory_gib"], "whole run, s": seconds}
    return {**columns, "first loss": rows[0]["loss"], "last loss": rows[-1]["loss"]}


def _pairs_per_step(context: Context) -> int:
    return 4 if context.dry_run else PAIRS_PER_STEP


def _steady(steps: list[Any]) -> list[Any]:
    """Compilation of the first steps' kernels is not training."""
    return steps[len(steps) // 3 :]


def _beside_trl(context: Context) -> dict[str, Any]:
    """The same model, pairs and steps by TRL, which is given batches of two sizes, and by ``dpo train`` before it."""
    try:
        import trl
    except ImportError as error:
        raise SkippedError(f"TRL does not import here: {first_line(error)}") from error
    from benchmarks.trl_peer import train_with_trl

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        note = save_job(folder, tiny=context.dry_run)
        ours = _train_ours(context, folder)
        context.row("dpo train", trainer="dpo train", **ours)
        columns: dict[str, Any] = {"note": f"TRL {trl.__version__}; {note}"}
        pairs = _pairs_per_step(context)
        for micro_batches in (1,) if context.dry_run else (4, 2):
            context.free_memory()
            if not context.dry_run:
                torch.cuda.reset_peak_memory_stats()
            name = f"TRL, batches of {pairs // micro_batches} pairs"
            if not context.begin(name):
                continue
            start = time.perf_counter()
            theirs = train_with_trl(
                folder / "model",
                folder / "pairs.jsonl",
                folder / f"trl-{micro_batches}",
                pairs_per_step=pairs,
                micro_batches=micro_batches,
                learning_rate=LEARNING_RATE,
                max_steps=2 if context.dry_run else 8,
                cuda=not context.dry_run,
            )
            seconds = time.perf_counter() - start
            rate = pairs / statistics.median(_steady(theirs.step_seconds))
            row = {"perf/pairs_per_second": rate, "steps": len(theirs.step_seconds), "whole run, s": seconds}
            row |= {"first loss": theirs.log_history[0]["loss"], "last loss": theirs.log_history[-1]["loss"]}
            if not context.dry_run:
                row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            del theirs
            context.row(name, trainer=name, **row)
            columns[f"ours over {name}"] = ours["perf/pairs_per_second"] / rate
    return columns


def _demo(context: Context) -> dict[str, Any]:
    """``dpo demo`` on this device: everything from data to report on the embedded job."""
    from engine.cli import main

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "demo"
        code = main(["demo", "--output", str(folder)])
        return {"ok": code == 0, "note": f"{len(list(folder.rglob('*')))} files"}


def save_job(folder: Path, *, tiny: bool, sizes: dict[str, int] | None = None) -> str:
    """Write a model with tokenizer and a file of pairs; returns the model in words.

    Args:
        sizes: of a model that is not tiny; those of ``JOB`` by default.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from benchmarks.end_to_end import generated_rows, save_model

    rows = generated_rows(24 if tiny else 20 * PAIRS_PER_STEP)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    save_model(folder / "model", [row["prompt"] + row["chosen"] for row in rows[:256]])
    sizes = TINY_JOB if tiny else sizes or JOB
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            num_key_value_heads=sizes["num_attention_heads"] // 2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "model")
    return f"random Llama, {model.num_parameters() / 1e6:.0f} M parameters, vocabulary {len(tokenizer)}"
