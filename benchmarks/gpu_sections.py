"""The sections of ``benchmarks.gpu``: each records what it finds as it finds it."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks import gpu_engine
from benchmarks.contenders import FROZEN, GRADIENTS, LOGPS, LOSS, Contender, contenders, first_line, versions
from benchmarks.inputs import HeadInputs, make_inputs, softmax_shape
from benchmarks.measure import Race, make_task
from benchmarks.recorder import Recorder, SkippedError
from benchmarks.shapes import GPU_BENCHMARK, HeadShape

__all__ = ["RUN", "Recorder", "SkippedError"]

RESPONSE_LENGTH = 1024
"""Rows of a response at the benchmark's shape: the length for which an error per response is promised."""
ROUNDS = 20
OTHER_SHAPES = (
    HeadShape(2048, 4096, 128256),
    HeadShape(8192, 2048, 32000),
    HeadShape(8192, 3584, 152064),
    HeadShape(8192, 2304, 256000),
    HeadShape(32768, 4096, 128256),
)
DRY_SHAPE, DRY_LENGTH = HeadShape(64, 64, 500), 8
CHECK_WORKERS = 6


def environment(record: Recorder) -> None:
    from dpo_kernels import describe
    from dpo_kernels.kernels.tile_config import tile_table

    record["versions"] = versions() | {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    choices = describe(record.device, torch.bfloat16 if record.device.type == "cuda" else torch.float32)
    record["describe"] = f"{choices}\n  tile shapes: {tile_table()}"
    if record.device.type == "cuda":
        properties = torch.cuda.get_device_properties(record.device)
        capability = f"{properties.major}.{properties.minor}"
        record["device"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors, compute capability {capability}"
        )
        record["bandwidth_tb_per_s"] = _copy_bandwidth(record.device)
    else:
        record["device"] = f"{platform.machine()}, {os.cpu_count()} cores"


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written by a large copy on the device, in TB/s."""
    source = torch.empty(2**30, dtype=torch.int32, device=device).fill_(1)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(5):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 5 * 2 * 2**32 / (start.elapsed_time(end) * 1e-3) / 1e12


def checks(record: Recorder) -> None:
    """Every numeric check. On a GPU several processes share them: most of the time goes into compiling kernels."""
    from benchmarks.gpu_checks import all_checks

    names = [check.name for check in all_checks(record.device, tiny=record.dry_run)]
    arguments = (str(record.device), record.dry_run)
    record["expected"] = len(names)
    rows: list[dict[str, Any]] = []
    if record.device.type != "cuda":
        for number in range(len(names)):
            rows.append(run_check(number, *arguments))
            record["rows"] = rows
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(CHECK_WORKERS, mp_context=context) as pool:
        for future in as_completed(pool.submit(run_check, number, *arguments) for number in range(len(names))):
            rows.append(future.result())
            record["rows"] = sorted(rows, key=lambda row: row["number"])


def run_check(number: int, device: str, tiny: bool) -> dict[str, Any]:
    """One check by its place in the list; an exception is a failure with its message."""
    from benchmarks.gpu_checks import all_checks

    check = all_checks(torch.device(device), tiny=tiny)[number]
    row: dict[str, Any] = {"number": number, "check": check.name, "bound": check.bound}
    start = time.perf_counter()
    try:
        row["value"] = check.run()
        row["ok"] = row["value"] <= check.bound
    except Exception as error:
        row |= {"ok": False, "error": f"{type(error).__name__}: {first_line(error)}"}
    if device != "cpu":
        torch.cuda.empty_cache()
    return {**row, "seconds": time.perf_counter() - start}


def head(record: Recorder) -> None:
    """Everyone at the benchmark's shape on real hidden states, then ours on random ones."""
    shape, length = (DRY_SHAPE, DRY_LENGTH) if record.dry_run else (GPU_BENCHMARK, RESPONSE_LENGTH)
    record["settings"] = f"N={shape.T} D={shape.D} V={shape.V} {record.dtype_name}, {length} rows per response"
    done: list[dict[str, Any]] = []
    for kind in ("real", "random"):
        inputs = make_inputs(kind, shape, length=length, device=record.device).to(record.device, record.dtype)
        record[f"{kind} inputs"] = f"{inputs.source}; {softmax_shape(inputs)}"
        for task in (LOSS, FROZEN, LOGPS, GRADIENTS):
            entrants = {task: _entrants(task, record, everyone=kind == "real")}
            done = _run_race(record, inputs, entrants, done, {"inputs": kind}, rounds=ROUNDS)


def _entrants(task: str, record: Recorder, *, everyone: bool) -> list[Contender]:
    """Ours and naive logits, or all; without those that compile when nothing is measured."""
    found = [c for c in contenders(task) if everyone or c.ours or c.name == "naive logits"]
    return [c for c in found if not (record.dry_run and c.compiles)]


def _run_race(
    record: Recorder,
    inputs: HeadInputs,
    entrants: dict[str, list[Contender]],
    done: list[dict[str, Any]],
    labels: dict[str, str],
    *,
    rounds: int,
) -> list[dict[str, Any]]:
    """Race, recording the table after every round; returns ``done`` with the race's rows."""
    race = Race(inputs, entrants)
    race.warm_up()
    rows = done
    for _ in range(2 if record.dry_run else rounds):
        race.round()
        rows = [*done, *({**labels, **row} for row in race.rows())]
        record["rows"] = rows
    record.free_memory()
    return rows


def shapes(record: Recorder) -> None:
    """Ours and naive logits at the shapes of other models."""
    done: list[dict[str, Any]] = []
    for shape in (HeadShape(32, 48, 300),) if record.dry_run else OTHER_SHAPES:
        length = DRY_LENGTH if record.dry_run else 256
        inputs = make_inputs("random", shape, length=length, device=record.device).to(record.device, record.dtype)
        entrants = {task: _entrants(task, record, everyone=False) for task in (LOSS, FROZEN, LOGPS)}
        done = _run_race(record, inputs, entrants, done, {"shape": str(shape)}, rounds=8)


def profile(record: Recorder) -> None:
    """Where the time of our paths goes, kernel by kernel: a text file."""
    from torch.profiler import ProfilerActivity

    cuda = record.device.type == "cuda"
    shape, length = (DRY_SHAPE, DRY_LENGTH) if record.dry_run else (GPU_BENCHMARK, RESPONSE_LENGTH)
    inputs = make_inputs("random", shape, length=length, device=record.device).to(record.device, record.dtype)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    texts, rows = [], []
    for task in (LOSS, FROZEN, LOGPS, GRADIENTS):
        for contender in contenders(task):
            if not contender.ours:
                continue
            run = contender.prepare(make_task(task, inputs))
            run()
            record.synchronize()
            with torch.profiler.profile(activities=activities) as found:
                for _ in range(3):
                    run()
                record.synchronize()
            averages = found.key_averages()
            order = "self_device_time_total" if cuda else "self_cpu_time_total"
            table = averages.table(sort_by=order, row_limit=14, max_name_column_width=70)
            texts.append(f"{contender.name}, {task}: 3 runs\n{table}\n")
            top = sorted(averages, key=lambda event: getattr(event, order), reverse=True)[:6]
            rows += [
                {"task": task, "contender": contender.name, "kernel": e.key, "ms per run": getattr(e, order) / 3e3}
                for e in top
            ]
            record["rows"] = rows
    (record.folder / "profile.txt").write_text("\n".join(texts))


def attention(record: Recorder) -> None:
    gpu_engine.attention(record)


def training(record: Recorder) -> None:
    gpu_engine.training(record)


RUN: dict[str, Callable[[Recorder], None]] = {
    "environment": environment,
    "checks": checks,
    "head": head,
    "attention": attention,
    "training": training,
    "profile": profile,
    "shapes": shapes,
}
