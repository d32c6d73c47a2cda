"""How a run asks its processes to divide model and packs, and whether they can."""

from __future__ import annotations

from .. import distributed, mesh
from ..config.schema import RunConfig
from ..errors import UserError
from .load import DTYPES
from .quantization import read_by_each


def divide_work(config: RunConfig) -> None:
    """Have the processes divide the work as ``config`` says; to be called on every rank before a model is loaded.

    Raises:
        UserError: they cannot.
    """
    train, model = config.train, config.model
    shards = train.shards_per_replica
    if distributed.size() > 1 and shards != 1 and read_by_each(model):
        if shards is not None:
            raise UserError(
                f"train.shards_per_replica={shards} does not fit {_quantised(config)}: quantised weights cannot be "
                "sharded; set it to 1 or null, each process then holds the whole model"
            )
        shards = 1
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
    gathered = None if train.param_dtype == "float32" else DTYPES[train.param_dtype]
    mesh.divide(shards=shards, context=train.context_parallel, gathered=gathered)


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
    among = "them" if shards == size else f"{shards} of them, in {size // shards} copies of the model"
    dtype = mesh.gathered_dtype()
    gathered = "" if dtype is None else f", gathered in {str(dtype).removeprefix('torch.')}"
    return f"parameters, gradients and optimizer state are sharded over {among} (FSDP2){gathered}{together}"
