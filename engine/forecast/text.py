"""The text of ``dpo plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..data.row_numbers import NumberSummary
from ..errors import UserError
from ..model.division import check_division, num_shards
from ..model.policy import Layout
from ..packing import PlanSummary, Step, describe_plan, plan_first_epoch, summarize_plan
from ..train.describe import unneeded_rows
from ..train.objective import Objective
from ..train.training_data import check_rows
from .budget import Budget, largest_budget
from .duration import Duration, forecast_duration, reason_of
from .layout import find_layout
from .memory import Memory, forecast_memory
from .resident import resident_bytes
from .shallow import work_of
from .target import Target

Line = tuple[str, str, str]
_FEW_TOKENS = 1000
"""What a step of fewer takes varies from one to the next."""


def describe_forecast(
    dataset: PreferenceDataset, config: RunConfig, target: Target | None = None, *, room: int | None = None
) -> str:
    """Steps, padding and sharing from lengths alone, then peak memory, and time where the device is there.

    Args:
        target: what it is for; by default this machine's device, in one process.
        room: bytes of memory of a device, for the most tokens of a pack that fit in it.

    Raises:
        UserError: no row, one that fits in no pack or that the loss does not take, or a model that cannot be trained
            as configured.
    """
    target = target or Target.here()
    check_division(config, target.processes)
    check_rows(config, Objective(config.loss), dataset)
    target.backend(config)
    # What is not there cannot try anything out; which layout is exact is a matter of the model's code.
    found = find_layout(_for_here(config) if target.absent else config, target.device)
    # After the check, which a run makes, too: what it leaves of the heap is there for what follows.
    resident = resident_bytes(config, target.device) if target.kind == "cpu" else 0
    config = replace(config, packing=found.packing)
    steps = plan_first_epoch(dataset, config)
    plan = summarize_plan(dataset, config, steps, mixers=found.layout.mixer_blocks)
    part = "window" if config.data.streaming else "epoch"
    lines = [*describe_plan(plan, config.packing, part=part), ("layout", found.name, found.source)]
    if config.loss.unpaired:
        beside = "; each with another row's completion, for the divergence" if "kto" in config.loss.loss_types else ""
        lines[0] = ("rows", lines[0][1], f"{dataset.desirable_G.mean():.0%} desirable{beside}")
    if words := NumberSummary(dataset).words():
        lines.append(("rows", "", words))
    lines[1:1] = _set_lines(dataset)
    lines += _memory_lines(config, dataset, steps, target=target, resident=resident, layout=found.layout, room=room)
    lines += _time_lines(config, dataset, steps, plan, target, found.layout)
    left, middle = (max(len(line[i]) for line in lines) for i in (0, 1))
    return "\n".join(f"{name:<{left}}  {value:>{middle}}  {note}".rstrip() for name, value, note in lines)


def _set_lines(dataset: PreferenceDataset) -> list[Line]:
    """The sets of a mixture: their rows in an epoch."""
    if dataset.mixture is None:
        return []
    sets = zip(dataset.source_names, dataset.mixture.counts, dataset.mixture.sizes, strict=True)
    return [
        (f"  {name}", f"{count:,}", f"an epoch, of {size:,}: {count / size:.2f} times each")
        for name, count, size in sets
    ]


def _memory_lines(
    config: RunConfig, dataset: PreferenceDataset, steps: Sequence[Step], *, room: int | None, **options: Any
) -> list[Line]:
    # Models with code of their own, and kernels, may do anything; the rest of the plan stands without them.
    try:
        memory = forecast_memory(config, dataset, steps, **options)
        target = options["target"]
        held = _held_words(num_shards(config, target.processes), target.processes)
        lines = [*_parts(memory, target, held, config), *_copy_lines(memory, config, target)]
        lines += [("  no effect", "", words) for _, words in unneeded_rows(config, target.kind)]
        if room is not None:
            budget = largest_budget(config, dataset, steps, room=room, **options)
            lines.append(_budget_line(budget, room, config.packing.tokens_per_pack))
        return lines
    except UserError:
        raise
    except Exception as error:
        return [("peak memory", "unknown", f"the model does not run on shapes alone: {reason_of(error)}")]


def _held_words(shards: int, processes: int) -> str:
    """What the numbers are of, where several processes share a run."""
    if processes == 1:
        return ""
    if shards == 1:
        return f"whole on each of {processes} processes"
    return f"of which each of {shards} processes holds its share" + (" of a copy" if shards < processes else "")


def _pack_words(m: Memory, target: Target, config: RunConfig) -> str:
    """What the activations are of."""
    ranks, kernels = config.train.context_parallel, config.model.kernels
    part = f", of which each of {ranks} processes has its part" if ranks > 1 else ""
    blocks = "" if kernels in ("auto", "none") else f"; blocks by {kernels}"
    if kernels == "auto" and target.kind == "cuda":
        blocks = "; blocks as the model has them, fused ones keep less (model.kernels)"
    return f"of the largest pack, {m.pack_tokens:,} tokens{part}{blocks}"


def _parts(m: Memory, target: Target, held: str, config: RunConfig) -> list[Line]:
    if target.absent:
        where = f"allocated on a CUDA device, forecast without one; attention by {m.backend}"
    elif target.kind == "cuda":
        where = f"allocated on {target.device}"
    else:
        where = "of this process, as runs report it on the CPU"
    lines = [
        ("peak memory", _size(m.peak), f"{where}; the lines below peak at different times"),
        ("  weights", _size(m.weights), held),
        ("  gradients", _size(m.gradients), ""),
        ("  optimizer state", _size(m.optimizer), ""),
        ("  activations", _size(m.activations), _pack_words(m, target, config)),
        ("  inside an op", _size(m.workspace), "of the head or of attention"),
    ]
    if m.gathered:
        lines.append(("  gathered", _size(m.gathered), "weights and gradients of a block or the head, on their way"))
    if target.kind == "cuda":
        nccl = ", buffers of NCCL" if target.processes > 1 else ""
        note = f"with the CUDA context, libraries{nccl} and gaps between blocks: an allowance"
        lines.insert(1, ("  on the device", _size(target.needed(m.peak)), note))
    if m.process:
        lines.append(("  process", _size(m.process), "Python, libraries and data"))
    return lines


def _budget_line(budget: Budget, room: int, asked: int) -> Line:
    name = f"fits {_size(room)}"
    if not budget.tokens:
        return (name, "nothing", f"not even a pack of the longest row, {budget.memory.pack_tokens:,} tokens")
    note = "largest packing.tokens_per_pack"
    if budget.whole_step:
        note += ": all pairs of a step in one pack"
    elif budget.tokens < asked:
        note += f": the run's {asked:,} do not fit"
    return (name, f"{budget.tokens:,}", note)


def _for_here(config: RunConfig) -> RunConfig:
    """With attention that this machine can run."""
    return replace(config, model=replace(config.model, attention="auto"))


def _time_lines(
    config: RunConfig,
    dataset: PreferenceDataset,
    steps: Sequence[Step],
    plan: PlanSummary,
    target: Target,
    layout: Layout,
) -> list[Line]:
    if target.absent or target.processes > 1:
        what = "such a device" if target.absent else "several processes"
        return [("time", "unknown", f"it is tried out, and there is no trial of {what} here")]
    device = target.device
    try:
        flops, trained = work_of(config, device, layout)
    except Exception as error:
        return [("time", "unknown", f"the model is not built without its weights: {reason_of(error)}")]
    options: dict[str, Any] = {"trained_weights": trained, "device": device, "layout": layout}
    return [_duration_line(forecast_duration(config, dataset, steps, plan, flops, **options))]


def _copy_lines(m: Memory, config: RunConfig, target: Target) -> list[Line]:
    """What checkpoints are written from where they are written beside the steps."""
    beside = target.kind == "cuda" if config.train.async_save is None else config.train.async_save
    if not beside or config.train.save_steps is None:
        return []
    each = " for each process" if target.processes > 1 else ""
    return [
        (
            "copy for checkpoints",
            _size(m.stored),
            f"of host memory{each}, beside the peak (train.async_save)",
        )
    ]


def _duration_line(d: Duration) -> Line:
    rate = f"{d.flop:.3g} FLOP at {d.efficiency:.0%} of the {d.matmul_rate:.3g} FLOP/s of matrix products here"
    source = f"as {d.trial.tokens:,} tokens took in a trial" if d.trial else f"an assumption ({d.untried})"
    if d.trial and d.trial.tokens < _FEW_TOKENS:
        source += ", roughly: so small a step is mostly overhead"
    return ("time", _clock(d.seconds), f"{rate}, {source}; without start-up, references, evaluation and checkpoints")


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
