"""The text of ``dpo plan``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..data.row_numbers import NumberSummary
from ..errors import UserError
from ..model import resolve_device
from ..packing import check_fits, describe_plan, plan_first_epoch, summarize_plan
from ..train.objective import Objective
from .advice import needed
from .duration import Duration, forecast_duration, reason_of
from .layout import find_layout
from .memory import Memory, forecast_memory
from .resident import resident_bytes
from .shallow import work_of

Line = tuple[str, str, str]
_FEW_TOKENS = 1000
"""What a step of fewer takes varies from one to the next."""


def describe_forecast(dataset: PreferenceDataset, config: RunConfig) -> str:
    """Steps, padding and sharing from lengths alone, then peak memory and time on this machine.

    Raises:
        UserError: no row, one that fits in no pack or that the loss does not take, or a model that cannot be trained
            as configured.
    """
    Objective(config.loss).check_dataset(dataset)
    check_fits(
        dataset,
        tokens_per_pack=config.packing.tokens_per_pack,
        share_prompts=config.packing.share_prompts,
        in_rows=config.packing.layout == "rows",
    )
    device = resolve_device()
    found = find_layout(config, device)
    # After the check, which a run makes, too: what it leaves of the heap is there for what follows.
    resident = resident_bytes(config, device) if device.type == "cpu" else 0
    config = replace(config, packing=found.packing)
    steps = plan_first_epoch(dataset, config)
    plan = summarize_plan(dataset, config, steps, mixers=found.layout.mixer_blocks)
    lines = [*describe_plan(plan, config.packing), ("layout", found.name, found.source)]
    if words := NumberSummary(dataset).words():
        lines.append(("rows", "", words))
    lines[1:1] = _set_lines(dataset)
    # Models with code of their own, and kernels, may do anything; the rest of the plan stands without them.
    try:
        memory = forecast_memory(config, dataset, steps, device=device, resident=resident, layout=found.layout)
        lines += _memory_lines(memory, device)
    except UserError:
        raise
    except Exception as error:
        lines.append(("peak memory", "unknown", f"the model does not run on shapes alone: {reason_of(error)}"))
    try:
        flops, trained = work_of(config, device, found.layout)
    except Exception as error:
        lines.append(("time", "unknown", f"the model is not built without its weights: {reason_of(error)}"))
    else:
        options: dict[str, Any] = {"trained_weights": trained, "device": device, "layout": found.layout}
        lines.append(_duration_line(forecast_duration(config, dataset, steps, plan, flops, **options)))
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


def _memory_lines(m: Memory, device: torch.device) -> list[Line]:
    where = "of this process, as runs report it on the CPU" if device.type == "cpu" else f"allocated on {device}"
    lines = [
        ("peak memory", _size(m.peak), f"{where}; the lines below peak at different times"),
        ("  weights", _size(m.weights), ""),
        ("  gradients", _size(m.gradients), ""),
        ("  optimizer state", _size(m.optimizer), ""),
        ("  activations", _size(m.activations), f"of the largest pack, {m.pack_tokens:,} tokens"),
        ("  inside an op", _size(m.workspace), "of the head or of attention"),
    ]
    if device.type == "cuda":
        note = "with the CUDA context, libraries and gaps between blocks: an allowance"
        lines.insert(1, ("  on the device", _size(needed(m, device)), note))
    if m.process:
        lines.append(("  process", _size(m.process), "Python, libraries and data"))
    return lines


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
