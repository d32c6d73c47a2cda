"""Gradients of several copies of a model, or of shards of it: added up once a step, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import distributed, mesh

BUCKET = 2**26
"""Numbers that are added at a time: 256 MiB in float32, three times on every process."""


def sum_in_order(parameters: Sequence[Tensor], bucket: int = BUCKET) -> None:
    """Make the gradient of each parameter its sum over all copies of the model, float32, the same bits in every copy.

    Every rank adds up one part of the numbers in float32, in the order of the ranks, and tells the others: as much
    traffic as an all-reduce has, whose order of additions depends on the machine. A gradient that a rank lacks counts
    as zero there; one that all ranks lack stays absent, as in one process.

    Args:
        parameters: whole, or sharded alike in every copy.
    """
    flat = []
    for parameter, there in zip(parameters, _had_by_any(parameters), strict=True):
        if there:
            _make_room(parameter)
            assert parameter.grad is not None
            flat.append(distributed.local_tensor(parameter.grad).view(-1))
    for pieces in _buckets(flat, bucket):
        total = _sum(torch.cat(pieces))
        for piece, part in zip(pieces, total.split([len(piece) for piece in pieces]), strict=True):
            piece.copy_(part)


def _had_by_any(parameters: Sequence[Tensor]) -> list[bool]:
    """Whether any rank has a gradient of each parameter."""
    # In host memory: nobody waits for a device.
    own = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    return torch.stack(distributed.each_rank(own)).any(0).tolist()


def _make_room(parameter: Tensor) -> None:
    """Let the gradient be a contiguous float32 tensor, of zeros where there is none."""
    if parameter.dtype != torch.float32:
        # Any dtype may then be assigned.
        parameter.grad_dtype = None  # type: ignore[attr-defined]
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(
            parameter, dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False
        )
    else:
        parameter.grad = parameter.grad.float().contiguous()


def _buckets(vectors: Sequence[Tensor], bucket: int) -> Iterator[list[Tensor]]:
    """The vectors in their order, cut into pieces that fill one bucket after the other."""
    pieces: list[Tensor] = []
    room = bucket
    for vector in vectors:
        while len(vector):
            pieces.append(vector[:room])
            vector = vector[room:]
            room -= len(pieces[-1])
            if not room:
                yield pieces
                pieces, room = [], bucket
    if pieces:
        yield pieces


def _sum(own: Tensor) -> Tensor:
    """The sum over the copies of a float32 vector that is as long in each."""
    import torch.distributed as dist

    ranks, group = mesh.copies(), mesh.copy_group(own.device.type)
    width = -(-own.numel() // ranks)
    given = own.new_zeros(ranks, width)
    given.view(-1)[: own.numel()] = own
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, group=group)
    summed, *others = taken.unbind()
    for other in others:
        summed += other
    dist.all_gather(list(given.unbind()), summed, group=group)
    return given.view(-1)[: own.numel()]
