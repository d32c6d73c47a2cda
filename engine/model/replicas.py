"""Gradients of processes that each hold the whole model: added up once a step, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import distributed

BUCKET = 2**26
"""Numbers that are added at a time: 256 MiB in float32, three times on every process."""


def sum_in_order(parameters: Sequence[Tensor], bucket: int = BUCKET) -> None:
    """Replace the gradient of each parameter by its sum over all ranks, the same bits on every rank.

    Every rank adds up one part of the numbers in float32, in the order of the ranks, and tells the others: as much
    traffic as an all-reduce has, whose order of additions depends on the machine. A gradient that is missing counts as
    zero.
    """
    for members in _buckets(parameters, bucket):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        total = _sum(torch.cat([g.reshape(-1).float() for g in grads]))
        for parameter, grad, part in zip(members, grads, total.split([g.numel() for g in grads]), strict=True):
            if parameter.dtype != torch.float32:
                # Any dtype may then be assigned.
                parameter.grad_dtype = None  # type: ignore[attr-defined]
            parameter.grad = part.view_as(grad)


def _buckets(parameters: Sequence[Tensor], bucket: int) -> Iterator[list[Tensor]]:
    """Parameters in their order, so many that their numbers fill a bucket, or one alone that is larger."""
    members: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if members and size + parameter.numel() > bucket:
            yield members
            members, size = [], 0
        members.append(parameter)
        size += parameter.numel()
    if members:
        yield members


def _sum(own: Tensor) -> Tensor:
    """The sum over the ranks of a float32 vector that is as long on each."""
    import torch.distributed as dist

    ranks = distributed.size()
    width = -(-own.numel() // ranks)
    given = own.new_zeros(ranks, width)
    given.view(-1)[: own.numel()] = own
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given)
    dist.all_gather(list(given.unbind()), taken.sum(0))
    return given.view(-1)[: own.numel()]
