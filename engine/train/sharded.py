"""The part of a checkpoint that several processes write together: model and optimizer state, each its own shards.

``torch.distributed.checkpoint`` plans who writes what and puts the shards together again for any number of processes;
the files are safetensors, in the layout of its Hugging Face writer. Tensors are named ``model/<parameter>``,
``optimizer/<slot>/<parameter>`` and, of a reference that training moves, ``reference/<parameter>``. With adapters only
what is trained is stored; the base has not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .. import distributed
from ..model import Policy
from ..model.sources import SHARDS

MODEL, OPTIMIZER, REFERENCE = "model", "optimizer", "reference"
"""Parts of the state: what the names of its tensors begin with."""
Empty = Callable[[Tensor, torch.dtype, Sequence[int]], Tensor]
"""Makes room for a tensor of a shape that is sharded as a parameter is."""


def save(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], group: Any = None) -> None:
    """Write the shards of this process below ``folder``; when it returns on rank 0, those of all processes are there.

    Args:
        tensors: by the part of the state and their names in it, which are ``<slot>/<parameter>`` in the optimizer's.
        group: the processes; all by default.
    """
    state = {f"{part}/{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    with _own_errors():
        dcp.save(state, storage_writer=writer, process_group=group)


def load(path: Path, policy: Policy, *, part: str = MODEL) -> None:
    """Load the weights of a checkpoint into ``policy``, bit for bit.

    Args:
        part: ``REFERENCE`` for those of the reference.
    """
    _load(path, {f"{part}/{name}": tensor for name, tensor in model_tensors(policy).items()})


def has_rows_of(param: Tensor, shape: Sequence[int]) -> bool:
    """Whether what has a shape is sharded as a parameter: moments are, and what belongs to its rows."""
    return bool(shape) and bool(param.ndim) and shape[0] == param.shape[0]


def load_optimizer(path: Path, params: Mapping[str, Tensor], empty: Empty) -> dict[str, Tensor]:
    """The optimizer's tensors by ``<slot>/<parameter>``, sharded as the parameters are.

    Args:
        params: by name.
        empty: makes room for a slot.
    """
    state: dict[str, Tensor] = {}
    for key, entry in _reader(path).read_metadata().state_dict_metadata.items():
        if key.startswith(f"{OPTIMIZER}/"):
            assert isinstance(entry, TensorStorageMetadata)
            param, dtype = params[key.split("/", 2)[2]].detach(), entry.properties.dtype
            if has_rows_of(param, entry.size):
                state[key] = empty(param, dtype, entry.size)
            else:
                state[key] = torch.empty(entry.size, dtype=dtype)
    _load(path, state)
    return {key.removeprefix(f"{OPTIMIZER}/"): tensor for key, tensor in state.items()}


def model_tensors(policy: Policy) -> dict[str, Tensor]:
    """The parameters that a checkpoint holds: with adapters those that are trained."""
    named = policy.model.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad or not policy.has_adapter}


def _load(path: Path, state: dict[str, Tensor]) -> None:
    with _own_errors():
        dcp.load(state, storage_reader=_reader(path), no_dist=distributed.size() == 1)


def _reader(path: Path) -> dcp.HuggingFaceStorageReader:
    return dcp.HuggingFaceStorageReader(str(path / SHARDS))


@contextmanager
def _own_errors() -> Iterator[None]:
    """Errors of single processes come wrapped; what went wrong with the first of them says more."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
