"""The state of an optimizer as named tensors, so that it is stored without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..errors import UserError


def state_tensors(state: Mapping[int, Mapping[str, Any]], names: list[str]) -> dict[str, Tensor]:
    """``slot/parameter`` -> tensor. A whole number, such as the step count of bitsandbytes, becomes an int64 scalar.

    Args:
        state: the part ``state`` of an optimizer's ``state_dict``.
        names: of the parameters, in the order of the optimizer.

    Raises:
        UserError: a slot that is neither, which could not be restored to the same bits.
    """
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for index, slots in state.items():
        for slot, value in slots.items():
            if isinstance(value, int):
                value = torch.tensor(value, dtype=torch.int64)
            if not isinstance(value, Tensor):
                raise UserError(
                    f"the optimizer keeps {slot} of {names[index]} as {type(value).__name__}, which checkpoints cannot "
                    "hold: choose another optim.optimizer"
                )
            value = value.contiguous()
            place = distributed.local_tensor(value).data_ptr()
            # A file holds no two tensors of one storage.
            tensors[f"{slot}/{names[index]}"] = value.clone() if place in stored else value
            stored.add(place)
    return tensors


def slots_of(tensors: Mapping[str, Tensor], names: list[str]) -> dict[int, dict[str, Any]]:
    """The inverse of ``state_tensors``."""
    position = {name: i for i, name in enumerate(names)}
    slots: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        slot, name = key.split("/", 1)
        whole = tensor.dtype == torch.int64 and tensor.ndim == 0
        slots.setdefault(position[name], {})[slot] = int(tensor) if whole else tensor
    return slots
