"""What each of several processes holds beside weights, gradients and state: for FSDP2, or to add up gradients.

Units are those of ``engine/model/shard.py``: each block, embedding and head, the rest. While one is computed, the next
is gathered: into one buffer, and out of it into parameters. Backward, a unit's gradients are complete before they are
summed over the processes, out of a buffer of the same size in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn

from ..model import Policy
from ..model.replicas import BUCKET
from ..model.shard import transformer_blocks
from .live_storage import storage_bytes

SUM_BYTES = 4
"""Of a number of a gradient, when it is summed."""


def gathered_bytes(policy: Policy, shards: int, dtype: torch.dtype | None = None) -> int:
    """Most bytes of gathered units and of buffers for them, at any time of a step.

    Args:
        policy: not sharded, with or without data.
        dtype: what they are gathered in; that of each parameter by default.
    """
    if shards == 1:
        return 0

    def size(parameter: nn.Parameter) -> int:
        return (dtype or parameter.dtype).itemsize

    def gathered(unit: Iterable[nn.Parameter]) -> int:
        return sum(size(p) * shards * largest_share(p.numel(), p, shards) for p in unit)

    def reduced(unit: Iterable[nn.Parameter]) -> int:
        """The gradients themselves, and the buffer that they are summed out of."""
        trained = [p for p in unit if p.requires_grad]
        buffer = sum(SUM_BYTES * shards * largest_share(p.numel(), p, shards) for p in trained)
        return buffer + sum(size(p) * p.numel() for p in trained)

    units = _units(policy)
    sizes = [0, *map(gathered, units)]
    # The one that computes; the next one, in either direction, as a buffer and as parameters.
    weights = max(a + b + max(a, b) for a, b in pairwise(sizes))
    return weights + max(map(reduced, units))


def share_bytes(policy: Policy, shards: int) -> int:
    """Bytes of parameters that the process with the most holds of them, and of buffers, which each holds whole."""
    shares = sum(largest_share(p.nbytes, p, shards) for p in policy.parameters())
    return shares + storage_bytes(policy.buffers())


def largest_share(size: int, parameter: nn.Parameter, shards: int) -> int:
    """Of ``size`` that all rows of a parameter have alike, what the process with the most rows holds.

    FSDP gives the others as much, for rows that are not there.
    """
    rows = len(parameter) if parameter.ndim else 1
    return size * -(-rows // shards) // max(1, rows)


def adding_bytes(numbers: int) -> int:
    """What is held beside gradients of so many numbers while processes with copies of a model add them up."""
    return 3 * SUM_BYTES * min(numbers, BUCKET)


def _units(policy: Policy) -> list[list[nn.Parameter]]:
    """The parameters of each unit, in the order in which a forward pass needs them."""
    model = policy.causal_lm
    blocks = [list(block.parameters()) for block in transformer_blocks(model)][::-1]
    embedding, head = (list(part.parameters()) for part in (_embedding(model), _head(model)))
    tied = {id(p) for p in embedding} & {id(p) for p in head}
    units = blocks if tied else [embedding, *blocks, head]
    taken = {id(p) for unit in units for p in unit}
    rest = [p for p in policy.parameters() if id(p) not in taken]
    return [unit for unit in (rest, *units) if unit]


def _embedding(model: nn.Module) -> nn.Module:
    return model.get_input_embeddings()  # type: ignore[operator, no-any-return]


def _head(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()  # type: ignore[operator, no-any-return]
