"""How a run asks its processes to divide model and packs, and whether they can."""

from __future__ import annotations

import torch

from .. import distributed, mesh
from ..config.schema import RunConfig
from ..errors import UserError
from .load import DTYPES
from .quantization import stored_quantization


def divide_work(config: RunConfig) -> None:
    """Have the processes divide the work as ``config`` says; to be called on every rank before a model is loaded.

    Raises:
        UserError: they cannot.
    """
    size = distributed.size()
    check_division(config, size)
    mesh.divide(shards=num_shards(config, size), context=config.train.context_parallel, gathered=gathered_dtype(config))


def num_shards(config: RunConfig, processes: int) -> int:
    """How many of so many processes hold one copy of the model between them."""
    if processes == 1:
        return 1
    return config.train.shards_per_replica or (1 if _is_quantised(config) else processes)


def check_division(config: RunConfig, processes: int) -> None:
    """Raise a ``UserError`` where so many processes cannot divide the work as ``config`` says."""
    train, model = config.train, config.model
    shards = num_shards(config, processes)
    if shards != 1 and _is_quantised(config):
        raise UserError(
            f"train.shards_per_replica={shards} does not fit {_quantised(config)}: quantised weights cannot be "
            "sharded; set it to 1 or null, each process then holds the whole model"
        )
    if train.param_dtype != "float32" and model.dtype == "float32":
        raise UserError(
            f"train.param_dtype={train.param_dtype} computes in that dtype, and model.dtype is float32: set one of "
            "them to the other's"
        )
    if train.context_parallel > 1 and config.packing.layout == "rows":
        raise UserError(
            f"train.context_parallel={train.context_parallel} divides packs, and packing.layout=rows has none: set it "
            "to 1, or packing.layout to auto"
        )
    if train.context_parallel > 1 and config.loss.unpaired:
        raise UserError(
            f"train.context_parallel={train.context_parallel} divides packs of pairs and rankings, and "
            f"loss.loss_type={config.loss.loss_name} takes unpaired rows: set it to 1"
        )
    mesh.check(processes, shards=shards, context=train.context_parallel, gathered=gathered_dtype(config))


def gathered_dtype(config: RunConfig) -> torch.dtype | None:
    """What shards of parameters are gathered in, where that is not what they are kept in."""
    return None if config.train.param_dtype == "float32" else DTYPES[config.train.param_dtype]


def _is_quantised(config: RunConfig) -> bool:
    return bool(config.model.quantization or stored_quantization(config.model))


def _quantised(config: RunConfig) -> str:
    model = config.model
    if model.quantization:
        return f"model.quantization={model.quantization}"
    return f"model.model_name_or_path={model.model_name_or_path}, which is stored quantised"


def division_words() -> str:
    """How several processes hold the model, for people."""
    size, shards, ranks = distributed.size(), mesh.shards(), mesh.context_size()
    together = f"; {ranks} work on each pack, by heads" if ranks > 1 else ""
    if shards == 1:
        return f"each holds the whole model; gradients are added up once a step{together}"
    among = (
        "them"
        if shards == size
        else f"{shards} of them, in {size // shards} copies of the model, whose gradients are added up once a step"
    )
    dtype = mesh.gathered_dtype()
    gathered = "" if dtype is None else f", gathered in {str(dtype).removeprefix('torch.')}"
    return f"parameters, gradients and optimizer state are sharded over {among} (FSDP2){gathered}{together}"
