"""Checkpoints for exact resume, and what else makes a run folder a run.

``checkpoint-<step>/`` holds the model (or adapter) in Hugging Face layout, the tokenizer, the optimizer state and
random generators as safetensors, and ``trainer_state.json``. Several processes write their shards of model and
optimizer state instead, see ``engine/train/sharded.py``; any number of processes reads both. There is no pickle. A
checkpoint counts only when it is complete: see ``engine/durable.py``. ``checkpoint-<step>-stopped/`` is one
that a run wrote because it was asked to end; it goes when a later one is there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from .. import distributed
from ..durable import (
    check_content,
    disk_errors,
    is_complete,
    remove_folder,
    temporary_path,
    write_folder,
)
from ..errors import UserError
from ..model import Policy
from ..model.adapter_forms import ADAPTER_CONFIG, ADAPTER_FILE
from ..model.adapters import TRAINED
from ..model.composites import put_in_whole
from ..model.sources import MODEL_CONFIG, STATE_FILE
from ..plain_json import exact_json, read_exact_json
from ..run_folder import CONFIG_FILE, METRICS_FILE
from . import sharded
from .host_memory import empty_rows
from .optimizer_state import slots_of, state_tensors
from .row_blocks import from_flat_blocks
from .sharded import MODEL, OPTIMIZER, REFERENCE

OPTIMIZER_FILE = "optimizer.safetensors"
REFERENCE_FILE = "reference.safetensors"
RANDOM_FILE = "random_state.safetensors"
RANK_RANDOM_FILE = "random_state.{rank:05d}.safetensors"
FORMAT = 2

_STOPPED = "-stopped"
_NAME = re.compile(rf"checkpoint-(\d+)({_STOPPED})?")
_RUN_FILES = (CONFIG_FILE, METRICS_FILE, MODEL_CONFIG, ADAPTER_CONFIG)


def checkpoint_path(output_dir: Path, step: int, *, stopped: bool = False) -> Path:
    return output_dir / f"checkpoint-{step}{_STOPPED if stopped else ''}"


def complete_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first, as (step, folder)."""
    return [(step, path) for step, path in _checkpoints(output_dir) if is_complete(path)]


def newest_checkpoint(output_dir: Path) -> tuple[int, Path] | None:
    """The newest checkpoint as (step, folder), damaged or not: folders appear and go whole, so none is half-written."""
    return next(reversed(_checkpoints(output_dir)), None)


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    if not output_dir.is_dir():
        return []
    found = ((int(m[1]), p) for p in output_dir.iterdir() if (m := _NAME.fullmatch(p.name)))
    # Of one step, the regular one is newer: the run went on to it.
    return sorted(found, key=lambda entry: (entry[0], not _is_stopped(entry[1])))


def _is_stopped(path: Path) -> bool:
    return path.name.endswith(_STOPPED)


def prune_checkpoints(output_dir: Path, limit: int | None, *, best: Path | None = None) -> None:
    """Delete all but ``limit`` complete checkpoints: the newest, ``best`` where one is named, and those before the
    newest. Call it only when the newest is durable.

    What runs wrote when they were asked to end does not count, and goes as soon as it is not the newest.
    """
    newest = newest_checkpoint(output_dir)
    remove_stopped(output_dir, kept=None if newest is None else newest[1])
    if limit is None:
        return
    regular = [path for _, path in complete_checkpoints(output_dir) if not _is_stopped(path)]
    kept = regular[-limit:]
    if best is not None and best not in kept:
        # As transformers does, a limit of one keeps two.
        kept = [best, *regular[-max(limit - 1, 1) :]]
    for path in regular:
        if path not in kept:
            remove_folder(path)


def remove_stopped(output_dir: Path, *, kept: Path | None = None) -> None:
    """Delete the checkpoints that runs wrote when they were asked to end, all but ``kept``."""
    for _, path in _checkpoints(output_dir):
        if _is_stopped(path) and path != kept:
            remove_folder(path)


def passing_checkpoints(output_dir: Path, limit: int | None) -> list[Path]:
    """Those that do not stay: a run that goes on deletes them as soon as later ones are there."""
    return [path for _, path in _checkpoints(output_dir) if limit is not None or _is_stopped(path)]


def refuse_other_run(output_dir: Path) -> None:
    """Raise a ``UserError`` when ``output_dir`` already holds a run."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"train.output_dir={output_dir} is a file: give a folder")
    held = next((name for name in _RUN_FILES if (output_dir / name).exists()), None)
    if held is None and output_dir.is_dir():
        held = next((p.name for p in output_dir.iterdir() if _NAME.fullmatch(p.name)), None)
    if held is not None:
        raise UserError(
            f"train.output_dir={output_dir} already holds a run ({held}): "
            "continue it with --resume, or choose another train.output_dir"
        )


class Saved(NamedTuple):
    """What a checkpoint holds of a run, beside numbers."""

    policy: Policy
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    names: list[str]
    """Of the parameters, in the order of the optimizer."""
    reference: Policy | None = None
    """A reference model that training moves."""


class Content(NamedTuple):
    """The state that a checkpoint is written from: what later steps change."""

    tensors: dict[str, dict[str, Tensor]]
    """Under ``MODEL``, ``OPTIMIZER`` and ``REFERENCE``; of several processes the shards of this one."""
    random: dict[str, Tensor]
    record: str
    """``trainer_state.json``."""


def collect(saved: Saved, *, step: int, state: dict[str, Any]) -> Content:
    """What ``save_checkpoint`` writes, as it is now. Every rank must call it.

    Tensors are those of the run, but for random generators: they hold until the next step.

    Args:
        state: JSON values that come back from ``read_state``.
    """
    optimizer, groups = _optimizer_tensors(saved.optimizer, saved.names)
    random_tensors, python_random = _random_state()
    ranks, python_states = distributed.size(), distributed.gather(python_random)
    record = {"format": FORMAT, "step": step, "ranks": ranks, **state, "param_groups": groups}
    record["python_random"] = python_random if ranks == 1 else python_states
    tensors = {MODEL: _own_state(saved.policy), OPTIMIZER: optimizer}
    if saved.reference is not None:
        tensors[REFERENCE] = _parameters(saved.reference)
    return Content(tensors, random_tensors, exact_json(record, indent=1) + "\n")


def save_checkpoint(
    output_dir: Path, saved: Saved, content: Content, *, step: int, stopped: bool = False, group: Any = None
) -> Path:
    """Write ``checkpoint-<step>``; it is durable and complete when this returns. Every rank must call it.

    Args:
        content: of ``collect``, or a copy of it in host memory.
        stopped: whether it is one that goes when a later one is there.
        group: of processes, in place of all: one that no other thread uses.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are untouched.
    """
    ranks = distributed.size()

    def fill(folder: Path) -> None:
        """The own part of this process."""
        if ranks > 1:
            distributed.barrier(group)
            save_file(content.random, folder / RANK_RANDOM_FILE.format(rank=distributed.rank()))
            sharded.save(folder, content.tensors, group)
        else:
            save_weights(saved.policy, folder, content.tensors[MODEL])
            saved.tokenizer.save_pretrained(folder)
            save_file(content.tensors[OPTIMIZER], folder / OPTIMIZER_FILE)
            if REFERENCE in content.tensors:
                save_file(content.tensors[REFERENCE], folder / REFERENCE_FILE)
            save_file(content.random, folder / RANDOM_FILE)
        if distributed.is_main():
            (folder / STATE_FILE).write_text(content.record, encoding="utf-8")

    path = checkpoint_path(output_dir, step, stopped=stopped)
    distributed.announce("flushes checkpoints to the disk and adds checksums")
    if distributed.is_main():
        write_folder(path, fill)
    else:
        with disk_errors(path), _removed_by_first(temporary_path(path)):
            fill(temporary_path(path))
    distributed.barrier(group)
    return path


def _own_state(policy: Policy) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: all of it, or what is trained of its adapter; of a sharded one parameters."""
    if distributed.size() > 1:
        return sharded.model_tensors(policy)
    named = policy.model.state_dict(keep_vars=True).items()
    return {name: tensor.detach() for name, tensor in named if tensor.requires_grad or not policy.has_adapter}


def _parameters(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in policy.model.named_parameters()}


@contextmanager
def _removed_by_first(folder: Path) -> Iterator[None]:
    """The first process removes ``folder`` when it fails; what others then miss in it is not the fault."""
    try:
        yield
    except Exception as error:
        if folder.exists():
            raise
        raise distributed.PeerFailure(f"{folder} was removed by the first process") from error


def is_sharded(state: Mapping[str, Any]) -> bool:
    """Whether several processes wrote the checkpoint of ``state``."""
    return state.get("ranks", 1) > 1


def save_weights(
    policy: Policy, folder: Path, weights: Mapping[str, Tensor] | None = None, whole: Any | None = None
) -> None:
    """Write the model, or the adapter alone, in Hugging Face layout and the dtype that its parameters have.

    Args:
        weights: the whole state of a sharded model, or of its adapter.
        whole: the checkpoint of several models that the text model is put back into.
    """
    options: dict[str, Any] = (
        {"save_embedding_layers": False, "selected_adapters": [TRAINED]} if policy.has_adapter else {}
    )
    if whole is not None:
        options["state_dict"] = put_in_whole(whole, policy.causal_lm, weights)
    elif weights is not None:
        options["state_dict"] = dict(weights)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        (whole or policy.model).save_pretrained(folder, **options)  # type: ignore[operator]
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def read_state(path: Path) -> dict[str, Any]:
    """``trainer_state.json`` of a checkpoint whose content fits its checksums.

    Raises:
        UserError: a file is damaged, or another version wrote it.
    """
    named = _NAME.fullmatch(path.name)
    assert named is not None
    step = int(named[1])
    earlier = [str(p) for s, p in complete_checkpoints(path.parent) if s < step]
    where = f"continue from {earlier[-1]}" if earlier else "start anew, since there is no earlier checkpoint"
    check_content(path, remedy=f"delete {path} and {where} with --resume")
    state = read_exact_json((path / STATE_FILE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has format {state['format']}, this version reads {FORMAT}: resume it where it was made"
        )
    if state["step"] != step:
        raise UserError(f"{path} holds the checkpoint of step {state['step']}: delete it, or give it its name back")
    return state


def load_adapter(policy: Policy, path: Path) -> None:
    """Load the adapter weights of a checkpoint into ``policy``."""
    from peft import get_peft_model_state_dict

    saved = load_file(path / ADAPTER_FILE)
    for name, tensor in get_peft_model_state_dict(
        policy.model, adapter_name=TRAINED, save_embedding_layers=False
    ).items():
        distributed.copy_full(tensor, saved[name])


def load_reference(path: Path, state: Mapping[str, Any], reference: Policy) -> None:
    """Restore a reference model that training moves, bit for bit."""
    if is_sharded(state):
        sharded.load(path, reference, part=REFERENCE)
        return
    stored = load_file(path / REFERENCE_FILE)
    for name, parameter in _parameters(reference).items():
        distributed.copy_full(parameter, stored[name])


def load_optimizer(path: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Restore the optimizer of ``save_checkpoint``, bit for bit."""
    params = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    offload, paged = (getattr(optimizer, name, False) for name in ("offload", "is_paged"))
    # The device may have no room for all of what is kept in host memory.
    empty = partial(empty_rows, on_host=offload or paged, pinned=offload)
    if is_sharded(state):
        tensors = sharded.load_optimizer(path, params, empty)
    else:
        stored = from_flat_blocks(load_file(path / OPTIMIZER_FILE), params)
        tensors = {key: _placed(tensor, params[key.split("/", 1)[1]], empty) for key, tensor in stored.items()}
    slots = slots_of(tensors, names)
    groups = optimizer.state_dict()["param_groups"]
    merged = [{**saved, "params": group["params"]} for saved, group in zip(state["param_groups"], groups, strict=True)]
    for group in merged:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": slots, "param_groups": merged})


def restore_random_state(path: Path, state: Mapping[str, Any]) -> None:
    """Set the global generators of torch, NumPy and Python to where the checkpoint found them.

    Those of another number of processes are left as they are: no old state fits.
    """
    if state.get("ranks", 1) != distributed.size():
        return
    if is_sharded(state):
        tensors = load_file(path / RANK_RANDOM_FILE.format(rank=distributed.rank()))
        python_random = state["python_random"][distributed.rank()]
    else:
        tensors, python_random = load_file(path / RANDOM_FILE), state["python_random"]
    torch.set_rng_state(tensors["torch"])
    devices = [tensors[key] for key in sorted(k for k in tensors if k.startswith("cuda"))]
    if devices and distributed.size() > 1:
        torch.cuda.set_rng_state(devices[0])
    elif devices and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
    kind, position, has_gauss, gauss = python_random["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().view(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = python_random["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _placed(tensor: Tensor, param: Tensor, empty: sharded.Empty) -> Tensor:
    """A tensor of optimizer state, sharded as its parameter where it has the same rows."""
    if not (sharded.has_rows_of(param, tensor.shape) and hasattr(param, "device_mesh")):
        return tensor
    placed = empty(param, tensor.dtype, tensor.shape)
    distributed.copy_full(placed, tensor)
    return placed


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    state = optimizer.state_dict()
    tensors = state_tensors(state["state"], names)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return tensors, read_exact_json(exact_json(groups))


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    key, position = numpy["state"]["key"], numpy["state"]["pos"]
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(key.view(np.int32).copy())}
    if torch.cuda.is_available():
        # One of several processes has one device of this machine.
        states = torch.cuda.get_rng_state_all() if distributed.size() == 1 else [torch.cuda.get_rng_state()]
        tensors |= {f"cuda.{i:03d}": s for i, s in enumerate(states)}
    rest = [numpy["bit_generator"], int(position), int(numpy["has_gauss"]), float(numpy["gauss"])]
    return tensors, {"numpy": rest, "python": random.getstate()}
