"""Every option that trades memory, traffic or precision, on and off, at the shapes of a model of 0.5B and one of 8B.

The smaller model is trained whole. Of the larger one, ways that ``dpo plan`` says fit the device train all layers, and
each option is tried alone on four of them. The saving of checkpoints and the options of several processes are measured
by ``dpo train`` itself.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_blocks import SHAPES, measure
from benchmarks.gpu_table import ROOT, Check, Context, SkippedError, first_line
from benchmarks.gpu_training import DRY_LAYERS, save_job

GIB = 2**30
SAVING = {"checkpointing": True}
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "master_weights stochastic": {"optim": {"master_weights": "stochastic"}},
    "master_weights kahan": {"optim": {"master_weights": "kahan"}},
    "activation_offload": {"activation_offload": True},
    "adamw_8bit": {"optim": {"optimizer": "adamw_8bit"}},
    "paged_adamw": {"optim": {"optimizer": "paged_adamw"}},
    "paged_adamw_8bit": {"optim": {"optimizer": "paged_adamw_8bit"}},
    "optim.offload": {"optim": {"offload": True}},
    "gradient_checkpointing": SAVING,
    "gradient_checkpointing selective": {"checkpointing": "selective"},
    "kernels liger": {"kernels": "liger"},
    "kernels compile": {"kernels": "compile"},
}
"""Those behind ``gradient_checkpointing`` are measured beside each other in the section of blocks, too."""
WHOLE: dict[str, dict[str, Any]] = {
    "stochastic, adamw_8bit, checkpointing": {
        **SAVING,
        "optim": {"master_weights": "stochastic", "optimizer": "adamw_8bit"},
    },
    "LoRA, selective": {"checkpointing": "selective", "lora": {"r": 16}},
    "LoRA, checkpointing": {**SAVING, "lora": {"r": 16}},
    "LoRA, checkpointing, liger": {**SAVING, "kernels": "liger", "lora": {"r": 16}},
    "LoRA, checkpointing, compile": {**SAVING, "kernels": "compile", "lora": {"r": 16}},
    "kahan, offload, checkpointing": {**SAVING, "optim": {"master_weights": "kahan", "offload": True}},
    "kahan, offload, checkpointing, liger": {
        **SAVING,
        "kernels": "liger",
        "optim": {"master_weights": "kahan", "offload": True},
    },
}
"""Of all layers of the larger model."""
SAVES: dict[str, dict[str, Any]] = {
    "no checkpoint": {"save_steps": None},
    "async_save": {"save_steps": 4, "async_save": True},
    "saved in the step": {"save_steps": 4, "async_save": False},
}
"""Of twelve steps: three checkpoints."""
JOB = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 10}
"""60 M parameters: with the optimizer's state a checkpoint is 0.7 GB, which a slow disk takes within a few steps."""
SPREADS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "param_dtype bfloat16": {"param_dtype": "bfloat16"},
    "shards_per_replica 1": {"shards_per_replica": 1},
    "context_parallel 2": {"context_parallel": 2},
}


def way_checks(context: Context) -> Iterator[Check]:
    """The whole larger model first, then each option beside none of them."""
    large = {**SHAPES["8B, 4 layers"], "num_hidden_layers": 32}
    for name, options in list(WHOLE.items())[: 1 if context.quick else None]:
        yield Check(f"8B: {name}", partial(_measure, context, options, large), seconds=90)
    for name, options in list(WAYS.items())[: 2 if context.quick else None]:
        for shape, layers in list(SHAPES.items())[: 1 if context.quick else None]:
            yield Check(f"{shape}: {name}", partial(_measure, context, options, layers), seconds=60)


def _measure(context: Context, options: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    needed, room = forecast_bytes(context, options, layers), _capacity(context)
    if needed > room:
        raise SkippedError(f"dpo plan forecasts {needed / GIB:.1f} GiB, and the device has {room / GIB:.1f} GiB")
    return {**measure(context, options, layers), "forecast GiB": needed / GIB}


def _capacity(context: Context) -> float:
    return float("inf") if context.dry_run else torch.cuda.get_device_properties(context.device).total_memory


def forecast_bytes(context: Context, options: dict[str, Any], layers: dict[str, Any]) -> int:
    """What ``dpo plan`` says that such a step takes of a CUDA device, for the pack that is measured."""
    from transformers import AutoConfig

    from benchmarks.gpu_engine import random_groups
    from engine.config.load import build_config
    from engine.errors import UserError
    from engine.forecast import Target
    from engine.forecast.memory import forecast_pack

    values = dict(DRY_LAYERS if context.dry_run else layers)
    sizes = (
        {"prompt": (5, 6), "response": (4, 5)} if context.dry_run else {"prompt": (384, 385), "response": (320, 321)}
    )
    groups = random_groups(2 if context.dry_run else 16, **sizes, responses=2, vocab=values["vocab_size"])
    train = {"gradient_checkpointing": options.get("checkpointing", False)}
    train["activation_offload"] = options.get("activation_offload", False)
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)
        # Fused blocks keep less, and what they are is found out on the device.
        model = {"model_name_or_path": folder, "lora": options.get("lora"), "kernels": "none"}
        sections = {
            "model": model,
            "data": {"dataset_name": "unused"},
            "optim": options.get("optim", {}),
            "train": train,
        }
        target = Target.of_kind("cuda", 1)
        try:
            memory = forecast_pack(build_config(sections, "benchmark"), groups, several=False, target=target)
        except (UserError, ImportError) as reason:
            raise SkippedError(str(reason)) from reason
    return target.needed(memory.peak)


def save_checks(context: Context) -> Iterator[Check]:
    """Steps beside the writing of a checkpoint; then, where there are several devices, how they share a run."""
    for name, train in list(SAVES.items())[1 if context.quick else 0 : 2 if context.quick else None]:
        yield Check(f"saves: {name}", partial(_train, context, train, 1), seconds=90)
    for name, train in list(SPREADS.items())[: 1 if context.quick else None]:
        yield Check(f"several processes: {name}", partial(_train_on_all, context, train), seconds=120)


def _train_on_all(context: Context, train: dict[str, Any]) -> dict[str, Any]:
    processes = torch.cuda.device_count()
    if processes < 2:
        raise SkippedError(f"several devices are needed, and this machine has {processes}")
    return _train(context, train, processes)


def _train(context: Context, options: dict[str, Any], processes: int) -> dict[str, Any]:
    """What a run of some steps says of itself: how long its steps take, the longest of them, and its memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        note = save_job(folder, tiny=context.dry_run, sizes=JOB)
        train = {"output_dir": str(folder / "run"), "logging_steps": 1, "report_to": [], "max_steps": 12, **options}
        sections = {
            "model": {"model_name_or_path": str(folder / "model"), "dtype": context.dtype_name},
            "data": {"dataset_name": str(folder / "pairs.jsonl"), "max_length": 1024},
            "packing": {"pairs_per_step": 4 if context.dry_run else 64, "tokens_per_pack": 16384},
            "loss": {"loss_type": "simpo", "beta": 2.0},
            "train": train,
        }
        (folder / "run.json").write_text(json.dumps(sections, allow_nan=False))
        if processes == 1:
            if not context.dry_run:
                torch.cuda.reset_peak_host_memory_stats()
            main([str(folder / "run.json")])
        else:
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
            command = [sys.executable, *launcher, "-m", "benchmarks.gpu_ways", str(folder / "run.json")]
            subprocess.run(command, cwd=ROOT, check=True)
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "perf/tokens_per_second" in row]
    rates = [row["perf/tokens_per_second"] for row in steps[len(steps) // 3 :]]
    columns: dict[str, Any] = {
        "tokens per second": statistics.median(rates),
        "slowest step, of the median": statistics.median(rates) / min(rates),
        "peak GiB": max(row["perf/peak_memory_gib"] for row in steps),
        "processes": processes,
        "note": note,
    }
    if not context.dry_run and processes == 1:
        columns["page-locked GiB"] = torch.cuda.host_memory_stats().get("active_bytes.peak", 0) / GIB
    return columns


def main(arguments: list[str]) -> None:
    """Train as a file says; one of several processes where a launcher started it."""
    try:
        from engine.config.load import build_config
        from engine.train.loop import train
    except ImportError as error:
        raise SkippedError(f"the engine does not import here: {first_line(error)}") from error
    train(build_config(json.loads(Path(arguments[0]).read_text()), "benchmark"))


if __name__ == "__main__":
    main(sys.argv[1:])
