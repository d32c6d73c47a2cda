"""Attention over a pack whose tokens lie on several processes: each computes all tokens of some of the heads.

What a process has of its own tokens goes to the processes that have the heads, and what attention gives comes back
(Ulysses, Jacobs et al. 2023, arXiv 2309.14509). Between the two, attention knows nothing of it.

Shape suffixes: B = 1, H query heads, K key heads, T tokens of the pack, L of a process, D head dimension, R processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ... import mesh
from ...errors import UserError


def whole_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All ``tokens`` of a pack for the own share of the heads: [1, H / R, T, D], and keys and values to them.

    Args:
        query: [1, H, L, D].
        key, value: [1, K, L, D]. Where there are fewer key heads than processes, or their number is no multiple, each
            is repeated.

    Raises:
        UserError: the heads cannot be divided.
    """
    ranks = mesh.context_size()
    check_heads(query.shape[1])
    repeats = math.lcm(key.shape[1], ranks) // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    # [R, L, W]: what each process is given, its heads of queries, keys and values side by side
    parts = [x[0].transpose(0, 1).reshape(x.shape[2], ranks, -1) for x in (query, key, value)]
    widths = [part.shape[2] for part in parts]
    received = _exchange(torch.cat(parts, dim=2).transpose(0, 1))
    whole = received.reshape(-1, sum(widths))[:tokens].split(widths, dim=1)
    shapes = [(x.shape[1] // ranks, x.shape[3]) for x in (query, key, value)]
    heads = [x.reshape(tokens, *shape).transpose(0, 1)[None] for x, shape in zip(whole, shapes, strict=True)]
    return heads[0], heads[1], heads[2]


def own_tokens(output: torch.Tensor, width: int) -> torch.Tensor:
    """All heads of the own ``width`` tokens, [1, L, H, D], from all tokens of the own heads, [1, T, H / R, D].

    What is beyond the pack's tokens is zero.
    """
    ranks = mesh.context_size()
    filled = F.pad(output[0], (0, 0, 0, 0, 0, ranks * width - output.shape[1]))
    received = _exchange(filled.reshape(ranks, width, -1))
    return received.transpose(0, 1).reshape(1, width, -1, output.shape[3])


def own_heads(x_H: torch.Tensor) -> torch.Tensor:
    """What the own heads have of values that lie on every process."""
    return x_H.chunk(mesh.context_size())[mesh.context_rank()]


def check_heads(heads: int) -> None:
    """Raise a ``UserError`` where attention heads cannot be divided over the processes of a pack."""
    ranks = mesh.context_size()
    if heads % ranks:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"train.context_parallel={ranks} divides the attention heads, and the model has {heads}: set it to one of "
            f"{', '.join(map(str, divisors))}"
        )


def _exchange(parts: torch.Tensor) -> torch.Tensor:
    """[R, ...]: what each process has for this one, from what this one has for each."""
    result: torch.Tensor = _Exchange.apply(parts)
    return result


class _Exchange(torch.autograd.Function):
    """Its own transpose: gradients go back the way that the values came."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor) -> torch.Tensor:
        return _send(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        return _send(grads[0])


def _send(parts: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    given = parts.contiguous()
    taken = torch.empty_like(given)
    # As bytes, which every backend takes.
    received, sent = (x.view(len(x), -1).view(torch.uint8) for x in (taken, given))
    dist.all_to_all_single(received, sent, group=mesh.context_group())
    return taken
