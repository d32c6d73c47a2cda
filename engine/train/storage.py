"""What a run writes: the dtypes of its model, the bytes of model and checkpoints, and whether the disk has room."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from .. import distributed, mesh
from ..config.schema import OptimConfig, RunConfig
from ..errors import UserError, counted
from ..model import Policy
from ..model.load import DTYPES
from .checkpoint import passing_checkpoints
from .row_blocks import moment_bytes, wide_parameters

_STATE_BYTES = {"adamw": 8, "rmsprop": 4, "paged_adamw": 8}
"""Of the optimizer's state, for each trained weight, where that is the same for all."""

log = logging.getLogger(__name__)


class DiskNeed(NamedTuple):
    """Bytes that a run will write, apart from logs and tokenizers."""

    model: int
    checkpoint: int
    """One of them."""
    due: int
    """Checkpoints until the end."""
    kept: int
    """The most of them that are there at a time, that which is being written included."""
    moments: int = 0
    """Of a checkpoint, what the optimizer makes at its first update."""

    @property
    def once(self) -> int:
        """Without this much a run cannot end."""
        return self.model + (self.checkpoint if self.due else 0)

    @property
    def most(self) -> int:
        return max(self.model + min(self.due, self.kept) * self.checkpoint, self.once)


def _moment_bytes(policy: Policy, optim: OptimConfig) -> Callable[[Tensor], int]:
    """Of what an optimizer keeps of each trained parameter."""
    if (each := _STATE_BYTES.get(optim.optimizer)) is not None:
        return lambda parameter: each * parameter.numel()
    wide = {id(parameter) for parameter in wide_parameters(policy)}
    return lambda parameter: moment_bytes(parameter.shape, wide=id(parameter) in wide)


def save_points(every: int | None, *, done: int, total: int) -> range | list[int]:
    """The steps after ``done`` that end with a checkpoint: each multiple of ``every``, and the last."""
    if every is None or done >= total:
        return []
    return [*range((done // every + 1) * every, total, every), total]


def disk_need(policy: Policy, config: RunConfig, *, done: int, total: int) -> DiskNeed:
    """What the steps from ``done`` to ``total`` of a run will write.

    Args:
        policy: before or after it is sharded; tied weights count once.
    """
    dtypes = stored_dtypes(policy, config)
    model = weights = remainders = moments = 0
    moments_of = _moment_bytes(policy, config.optim)
    seen: set[int] = set()
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (policy.has_adapter and not tensor.requires_grad):
            continue
        seen.add(id(tensor))
        model += tensor.numel() * dtypes.get(name, tensor.dtype).itemsize
        weights += tensor.numel() * tensor.dtype.itemsize
        if tensor.requires_grad:
            moments += moments_of(tensor)
            # what rounding leaves of weights in bfloat16
            remainders += 2 * tensor.numel() if config.optim.master_weights == "kahan" else 0
    if config.reference.sync_ref_model:
        weights *= 2
    due = len(save_points(config.train.every("save_steps", total), done=done, total=total))
    limit = config.train.save_total_limit
    if limit is not None and config.train.load_best_model_at_end:
        # The best and the newest.
        limit = max(limit, 2)
    # The one that goes is there until the next one is durable.
    kept = due if limit is None else min(due, limit + 1)
    return DiskNeed(model, weights + moments + remainders, due, kept, moments)


def check_disk(policy: Policy, config: RunConfig, *, done: int, total: int) -> None:
    """Say what a run will write and what is free, and warn when not all of it fits. All ranks must call it.

    Raises:
        UserError: the final model and one checkpoint do not fit, even where earlier checkpoints make room for them.
    """
    need = disk_need(policy, config, done=done, total=total)
    folder = Path(config.train.output_dir)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = distributed.broadcast(shutil.disk_usage(existing).free)
    # A run that goes on has written a part already, which makes room when its next checkpoint is there.
    going = distributed.broadcast(_passing(folder, config) if need.due else 0)
    ends = need.once <= free + going and (not need.due or need.checkpoint <= free)
    parts = f"the model {_size(need.model)}"
    if need.due:
        parts += (
            f", {counted(need.due, 'checkpoint')} of {_size(need.checkpoint)}, of which up to {need.kept:,} are kept"
        )
    words = f"{_size(need.most)} ({parts}), and {_size(free)} are free in train.output_dir={folder}"
    if ends and need.most <= free + going:
        log.info("disk space: this run writes up to %s", words)
        return
    advice = ["free space", "choose another train.output_dir"]
    if config.train.save_dtype != "bfloat16":
        advice.append("store half as much with train.save_dtype bfloat16")
    if need.due:
        advice.append("keep fewer checkpoints with train.save_total_limit, or write none with train.save_steps null")
    if ends:
        log.warning("disk space: this run writes up to %s: the disk fills on the way; %s", words, ", or ".join(advice))
        return
    raise UserError(f"this run writes at least {_size(need.once)}, up to {words}: {', or '.join(advice)}")


def saves_beside(policy: Policy, config: RunConfig, *, total: int) -> bool:
    """Whether checkpoints are written beside the steps that follow them. All ranks must call it, before step 1.

    Raises:
        UserError: ``train.async_save`` asks for it, and the copy of the state does not fit into host memory.
    """
    wanted = config.train.async_save
    on_gpu = policy.device.type == "cuda"
    if config.train.save_steps is None or not (on_gpu if wanted is None else wanted):
        return False
    here = min(int(os.environ.get("LOCAL_WORLD_SIZE", distributed.size())), distributed.size())
    need = disk_need(policy, config, done=0, total=total)
    # Each process copies what it holds: all of it, where each holds the whole model.
    copy, waits = (size * here // mesh.shards() for size in (need.checkpoint, need.moments))
    # Moments that are to wait there are not there yet.
    waits = waits if config.optim.offload else 0
    offloaded = f" and the optimizer's state {_size(waits)} (optim.offload)" if waits else ""
    free = min(distributed.gather(free_memory()))
    words = f"a copy of the state takes {_size(copy)} of host memory{offloaded}, and {_size(free)} are free"
    if copy + waits <= free:
        log.info("checkpoints are written beside the steps (train.async_save): %s", words)
        return True
    if wanted:
        raise UserError(f"train.async_save: {words}: free memory, or set train.async_save to false")
    log.info("checkpoints are written while training waits (train.async_save): %s", words)
    return False


def free_memory() -> int:
    """Bytes of host memory that this process may still take."""
    free = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        # The limit may be a word.
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(free), 0)


def _passing(folder: Path, config: RunConfig) -> int:
    """Bytes of the checkpoints that do not stay."""
    paths = passing_checkpoints(folder, config.train.save_total_limit)
    return sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file())


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def stored_dtypes(policy: Policy, config: RunConfig) -> dict[str, torch.dtype]:
    """The dtype of every parameter and stored buffer that is written in another dtype than the one it has.

    Of a full model these are the dtypes that ``from_pretrained(dtype=...)`` gives: what the model keeps in float32,
    such as the correction biases of routers, stays so. Of adapters the trained ones are meant.
    """
    if config.train.save_dtype == "auto":
        return {}
    dtype = DTYPES[config.train.save_dtype]
    tensors = policy.model.state_dict(keep_vars=True)
    if policy.has_adapter:
        wanted = {name: dtype for name, tensor in tensors.items() if tensor.requires_grad}
    else:
        wanted = dtypes_of(policy.causal_lm, dtype)
    floating = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {name: found for name, found in wanted.items() if name in floating and tensors[name].dtype != found}


def dtypes_of(causal_lm: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """By name: what ``from_pretrained(dtype=dtype)`` holds each parameter and stored buffer of a model in."""
    with torch.device("meta"):
        empty = type(causal_lm)._from_config(deepcopy(causal_lm.config), dtype=dtype)
    kept = getattr(causal_lm, "_keep_in_fp32_modules_strict", None) or ()
    # As transformers reads them: regular expressions in which a star stands for anything.
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in kept]
    return {
        name: torch.float32 if any(pattern.search(name) for pattern in patterns) else tensor.dtype
        for name, tensor in empty.state_dict().items()
    }
