"""What ``benchmarks.gpu`` measures of the head: the machine's own rates, races against peers and floors, a profile."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from benchmarks.contenders import Contender, contenders, versions
from benchmarks.gpu_table import Check, Context, SkippedError, first_line
from benchmarks.inputs import HeadInputs, make_inputs, softmax_shape
from benchmarks.measure import Race, make_task, milliseconds
from benchmarks.shapes import GPU_BENCHMARK, HeadShape
from benchmarks.tasks import FROZEN, GRADIENTS, LOGPS, LOSS

RESPONSE_LENGTH = 1024
"""Rows of a response at the benchmark's shape: the length for which an error per response is promised."""
ROUNDS = 20
COMPILING_SECONDS, LAST_SECONDS = 45.0, 5.0
"""With less left, a contender that compiles is not begun, and no further round."""
OTHER_SHAPES = (
    HeadShape(2048, 4096, 128256),
    HeadShape(8192, 2048, 32000),
    HeadShape(8192, 3584, 152064),
    HeadShape(8192, 2304, 256000),
    HeadShape(32768, 4096, 128256),
)
DRY_SHAPE, DRY_LENGTH = HeadShape(64, 64, 500), 8
SMI_FIELDS = (
    "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
)


def environment_checks(context: Context) -> Iterator[Check]:
    yield Check("versions", partial(_versions, context))
    yield Check("device", partial(_device, context))
    yield Check("what dpo_kernels chooses", partial(_choices, context))
    yield Check("what nvidia-smi says", _nvidia_smi, seconds=20)
    yield Check("copies, TB/s", partial(_copy_rate, context))
    yield Check("bare products, TFLOP/s", partial(_product_rate, context))


def _versions(context: Context) -> dict[str, Any]:
    found = versions() | {"python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    context.fact("versions", found)
    return {"note": ", ".join(f"{name} {version}" for name, version in found.items())}


def _device(context: Context) -> dict[str, Any]:
    words = f"{platform.machine()}, {os.cpu_count()} cores"
    if context.device.type == "cuda":
        found = torch.cuda.get_device_properties(context.device)
        words = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
        words += f", compute capability {found.major}.{found.minor}, {torch.cuda.device_count()} such devices"
    context.fact("device", words)
    return {"note": words}


def _choices(context: Context) -> dict[str, Any]:
    from dpo_kernels import describe
    from dpo_kernels.kernels.tile_config import tile_table

    context.fact("describe", f"{describe(context.device, context.dtype)}\n  tile shapes: {tile_table()}")
    return {}


def _nvidia_smi() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        raise SkippedError("nvidia-smi is not on the PATH")
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    return dict(zip(SMI_FIELDS.split(","), (cell.strip() for cell in done.stdout.split(",")), strict=False))


def _copy_rate(context: Context) -> float:
    """Bytes read and written by a large copy on the device."""
    source = torch.ones(2**12 if context.dry_run else 2**30, dtype=torch.int32, device=context.device)
    target = torch.empty_like(source)
    return 2e-9 * source.nbytes / _median(lambda: target.copy_(source), context)


def _product_rate(context: Context) -> float:
    size = 64 if context.dry_run else 8192
    # Not of ones: what operands hold changes the power that a product draws, and so the clock.
    a, b = (torch.randn(size, size, device=context.device, dtype=context.dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2e-9 * size**3 / _median(lambda: torch.mm(a, b, out=out), context)


def _median(run: Callable[[], Any], context: Context, rounds: int = 15) -> float:
    """Milliseconds, after three runs that do not count."""
    times = [milliseconds(run, context.device) for _ in range(3 + rounds)]
    return statistics.median(times[3:])


def head_checks(context: Context) -> Iterator[Check]:
    """Ours first on real hidden states, with every peer; then ours on random ones."""
    shape, length = (DRY_SHAPE, DRY_LENGTH) if context.dry_run else (GPU_BENCHMARK, RESPONSE_LENGTH)
    context.fact("settings", f"N={shape.T} D={shape.D} V={shape.V} {context.dtype_name}, {length} rows per response")
    make = cache(partial(_inputs, context, shape, length))
    for kind in ("real",) if context.quick else ("real", "random"):
        for task in (LOGPS, FROZEN, LOSS, GRADIENTS):
            everyone = kind == "real" and not context.quick
            entrants = [c for c in contenders(task) if everyone or c.ours or c.name == "naive logits"]
            run = partial(race, context, partial(make, kind), {task: entrants}, {"inputs": kind}, rounds=ROUNDS)
            yield Check(f"{task}, {kind} inputs", run, seconds=100)


def _inputs(context: Context, shape: HeadShape, length: int, kind: str) -> HeadInputs:
    inputs = make_inputs(kind, shape, length=length, device=context.device).to(context.device, context.dtype)
    context.fact(f"{kind} inputs", f"{inputs.source}; {softmax_shape(inputs)}")
    return inputs


def shape_checks(context: Context) -> Iterator[Check]:
    """Ours and naive logits at the shapes of other models."""
    for shape in (HeadShape(32, 48, 300),) if context.dry_run else OTHER_SHAPES:
        length = DRY_LENGTH if context.dry_run else 256
        for task in (LOSS,) if context.quick else (LOGPS, FROZEN, LOSS):
            entrants = [c for c in contenders(task) if c.ours or c.name == "naive logits"]
            make = partial(_inputs, context, shape, length, "random")
            run = partial(race, context, make, {task: entrants}, {"shape": str(shape)}, rounds=8)
            yield Check(f"{shape}, {task}", run, seconds=60)


def race(
    context: Context,
    make: Callable[[], HeadInputs],
    entrants: dict[str, list[Contender]],
    labels: dict[str, str],
    *,
    rounds: int,
) -> dict[str, Any]:
    """Time contenders in rounds. Each is a row from its first run on; one in whose run the process ended sits out."""
    order = {task: sorted(found, key=lambda c: (not c.ours, c.compiles)) for task, found in entrants.items()}
    found = Race(make(), {t: [c for c in those if _takes_part(context, c)] for t, those in order.items()})
    for task, entries in found.entries.items():
        for entry in entries:
            contender = entry.contender
            if contender.compiles and context.seconds_left() < COMPILING_SECONDS:
                entry.obstacle = "no time was left to compile it"
            else:
                context.begin(contender.name)
                found.first_run(task, entry)
            _write(context, found.row(task, entry) if entry.run is None else {"contender": contender.name}, labels)
            context.free_memory()
    ours = [e for entries in found.entries.values() for e in entries if e.contender.ours]
    return {"ok": all(e.run is not None for e in ours), "rounds": _rounds(context, found, labels, rounds)}


def _rounds(context: Context, found: Race, labels: dict[str, str], rounds: int) -> int:
    """Time everyone again and again; what was measured is written even when somebody fails in a later round."""
    for run in found.products.runs.values():
        run()
    done = 0
    try:
        while done < (2 if context.dry_run else rounds) and (done < 2 or context.seconds_left() > LAST_SECONDS):
            found.round()
            done += 1
            if done == 2:
                _write_all(context, found, labels)
    finally:
        if done:
            _write_all(context, found, labels)
            if not context.dry_run and shutil.which("nvidia-smi"):
                context.row("the machine", **labels, note=_clocks())
    return done


def _clocks() -> str:
    """What the device runs at just after the work."""
    try:
        found = _nvidia_smi()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {first_line(error)}"
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return ", ".join(f"{name} {found.get(name, 'not told')}" for name in names)


def _takes_part(context: Context, contender: Contender) -> bool:
    return context.key(contender.name) not in context.dead and not (context.dry_run and contender.compiles)


def _write_all(context: Context, found: Race, labels: dict[str, str]) -> None:
    for row in found.rows():
        _write(context, row, labels)


def _write(context: Context, row: dict[str, Any], labels: dict[str, str]) -> None:
    note = str(row.get("note", ""))
    status = "error" if note.startswith("not run: failed") else "skipped: absent" if "not run" in note else "ok"
    context.row(row["contender"], **{**labels, "status": status, **row})


def profile_checks(context: Context) -> Iterator[Check]:
    """Where the time of our paths goes, kernel by kernel."""
    shape, length = (DRY_SHAPE, DRY_LENGTH) if context.dry_run else (GPU_BENCHMARK, RESPONSE_LENGTH)
    make = cache(partial(_inputs, context, shape, length))
    for task in (LOSS, FROZEN, LOGPS, GRADIENTS):
        for contender in contenders(task):
            if contender.ours:
                yield Check(f"{task}: {contender.name}", partial(_profile_contender, context, make, task, contender))


def _profile_contender(context: Context, make: Callable[[str], HeadInputs], task: str, contender: Contender) -> Any:
    run = contender.prepare(make_task(task, make("random")))
    return profile(context, run, f"{contender.name}, {task}")


def profile(context: Context, run: Callable[[], Any], title: str, runs: int = 3) -> dict[str, Any]:
    """A row for each of the kernels with the most time, the share of time without any, and a table in profile.txt."""
    from torch.profiler import ProfilerActivity

    cuda = context.device.type == "cuda"
    run()
    context.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(runs):
            run()
        context.synchronize()
    averages = found.key_averages()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=20, max_name_column_width=70)
    with (context.folder / "profile.txt").open("a") as file:
        file.write(f"{title}: {runs} runs\n{table}\n\n")
    for event in sorted(averages, key=lambda e: getattr(e, order), reverse=True)[:10]:
        context.row(
            event.key[:90],
            **{"kernel": event.key[:90], "ms per run": getattr(event, order) / 1e3 / runs, "calls": event.count / runs},
        )
    return _idle(found) if cuda else {}


def _idle(found: Any) -> dict[str, Any]:
    """Time from the first kernel to the end of the last, and the share of it in which no kernel ran."""
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in found.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    )
    if not spans:
        return {"ok": False, "note": "the profiler saw no kernel"}
    busy, end = 0, spans[0][0]
    for start, stop in spans:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    return {"ms": whole / 1e6, "idle share": 1 - busy / whole}
