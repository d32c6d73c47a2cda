"""What each of several processes holds beside weights, gradients and state: for FSDP2, or to add up gradients.

Units are those of ``engine/model/shard.py``: each block, embedding and head, the rest. While one is computed, the next
is gathered: into one buffer, and out of it into parameters. Backward, a unit's gradients are complete before they are
summed over the processes, out of a buffer of the same size in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch import nn

from ..model import Policy
from ..model.replicas import BUCKET
from ..model.shard import transformer_blocks

SUM_BYTES = 4
"""Of a number of a gradient, when it is summed."""


def gathered_bytes(policy: Policy, shards: int) -> int:
    """Most bytes of gathered units and of buffers for them, at any time of a step.

    Args:
        policy: not sharded, with or without data.
    """
    if shards == 1:
        return 0
    sizes = [0, *(_gathered(unit) for unit in _units(policy))]
    # The one that computes; the next one, in either direction, as a buffer and as parameters.
    weights = max(a + b + max(a, b) for a, b in pairwise(sizes))
    # The gradients themselves, and the buffer that they are summed out of.
    reduced = max(2 * _reduced(unit) for unit in _units(policy))
    return weights + reduced


def largest_share(size: int, parameter: nn.Parameter, shards: int) -> int:
    """Of ``size`` that all rows of a parameter have alike, what the process with the most rows holds."""
    rows = len(parameter) if parameter.ndim else 1
    return size * -(-rows // shards) // rows


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


def _gathered(unit: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in unit)


def _reduced(unit: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * SUM_BYTES for p in unit if p.requires_grad)
