"""One pack on several processes: which of its tokens each works on, and how what they find becomes that of the pack.

Tokens are divided in their order, equally many to each, the last ones filled up. A completion token belongs to the
process that has the row which predicts it.

Legend: T tokens of the pack, N its completion tokens, L tokens of a process, M its completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import mesh
from .gather import gather_rows, pick_order

_IGNORED = -100


@dataclass(frozen=True)
class Slice:
    """What one of the processes that share a pack has of it."""

    input_ids_L: Tensor
    """int64 [L], filled up with zeros, as are the next two."""
    position_ids_L: Tensor
    repeats_L: Tensor
    rows_M: Tensor
    """int64 [M], of the own rows: whose hidden state predicts each completion token. One at least, which counts nothing
    where there is none: all processes run the head."""
    labels_M: Tensor
    """int64 [M]."""
    rows_order_M: Tensor
    """int64 [M], and ``rows_counts``: what ``pick_order`` gives for ``rows_M``."""
    rows_counts: tuple[int, ...]
    places_M: Tensor
    """int64: which of the pack's completion tokens these are; empty where there is none."""
    order_N: Tensor
    """int64 [N]: where each completion token is among those of all processes, ``most`` of each."""
    most: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids_L.numel()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Slice:
        """The same slice with ``change`` of each of its tensors."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changes: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changes)

    def gather_predicting(self, hidden_LD: Tensor) -> Tensor:
        """[M, D]: the hidden states that predict the own completion tokens."""
        return gather_rows(hidden_LD, self.rows_M, self.rows_order_M, self.rows_counts)

    def collect(self, own_M: Tensor) -> Tensor:
        """[N, ...]: what all processes of the pack have found of their completion tokens.

        To be used for the same loss on all of them: each takes the gradient of its own tokens.
        """
        result: Tensor = _Collect.apply(own_M, self)
        return result


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_M: Tensor, part: Slice) -> Tensor:
        import torch.distributed as dist

        ctx.part, ctx.shape = part, own_M.shape
        sent = own_M.new_zeros(part.most, *own_M.shape[1:])
        sent[: len(own_M)] = own_M
        parts = [torch.empty_like(sent) for _ in range(mesh.context_size())]
        dist.all_gather(parts, sent, group=mesh.context_group())
        return torch.cat(parts).index_select(0, part.order_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        own_M = grads[0].new_zeros(ctx.shape)
        places_M = ctx.part.places_M
        own_M[: len(places_M)] = grads[0].index_select(0, places_M)
        return own_M, None


def width(tokens: int, ranks: int) -> int:
    """Tokens of each of some processes that share a pack."""
    return -(-tokens // ranks)


def own_slice(
    input_ids_T: Tensor, position_ids_T: Tensor, repeats_T: Tensor, rows_N: np.ndarray, labels_N: Tensor
) -> Slice | None:
    """This process's slice of a pack, on the CPU; None where every process has packs of its own."""
    ranks, rank = mesh.context_size(), mesh.context_rank()
    if ranks == 1:
        return None
    size = width(len(input_ids_T), ranks)
    owners_N = rows_N // size
    counts = np.bincount(owners_N, minlength=ranks)
    most = max(int(counts.max()), 1)
    # Where each token is among those of its owner.
    order_N = np.empty(len(rows_N), np.int64)
    for owner in range(ranks):
        of_owner = np.flatnonzero(owners_N == owner)
        order_N[of_owner] = owner * most + np.arange(len(of_owner))
    places_M = np.flatnonzero(owners_N == rank)
    rows_M = rows_N[places_M] - rank * size
    labels_M = labels_N[torch.from_numpy(places_M)]
    if not len(places_M):
        rows_M, labels_M = np.zeros(1, np.int64), torch.tensor([_IGNORED])
    rows_order_M, rows_counts = pick_order(rows_M)

    def own(x_T: Tensor) -> Tensor:
        part = x_T[rank * size : (rank + 1) * size]
        return torch.cat([part, part.new_zeros(size - len(part))])

    return Slice(
        input_ids_L=own(input_ids_T),
        position_ids_L=own(position_ids_T),
        repeats_L=own(repeats_T),
        rows_M=torch.from_numpy(rows_M),
        labels_M=labels_M,
        rows_order_M=torch.from_numpy(rows_order_M),
        rows_counts=rows_counts,
        places_M=torch.from_numpy(places_M),
        order_N=torch.from_numpy(order_N),
        most=most,
    )
