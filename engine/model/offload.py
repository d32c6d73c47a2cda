"""Activations in host memory between the forward and the backward pass."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..packing.rows import RowPlan

_CPU = torch.device("cpu")
SMALLEST = 1024
"""Elements below which a copy is not worth its launch."""


class OffloadedActivations(saved_tensors_hooks):
    """While it is entered, what autograd saves of the packed tokens is kept in host memory.

    A tensor counts as an activation when one of its dimensions is the number of packed tokens, or when it begins with
    the rows of a block and is as large; weights and their copies in the compute dtype stay where they are. Copies run
    on the stream of the forward pass, from and to page-locked memory on CUDA, so no value and no order of operations
    changes. On the CPU the copies are made all the same.

    Args:
        num_tokens: packed tokens of the forward pass.
        rows: what of it is computed in rows.
        host: where copies lie; on the meta device nothing is copied, for forecasts of what is left.
    """

    def __init__(self, num_tokens: int, rows: RowPlan | None = None, host: torch.device = _CPU):
        self.num_tokens = num_tokens
        self.host = host
        self.shapes = () if rows is None else rows.shapes
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        if tensor.numel() < SMALLEST or not self._is_activation(tensor):
            return tensor
        if self.host.type == "meta":
            return tensor.device, torch.empty(tensor.shape, dtype=tensor.dtype, device=self.host)
        pinned = tensor.device.type == "cuda"
        held = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.host, pin_memory=pinned)
        held.copy_(tensor, non_blocking=pinned)
        return tensor.device, held

    def _is_activation(self, tensor: torch.Tensor) -> bool:
        if self.num_tokens in tensor.shape:
            return True
        # a module that is in rows may put its length anywhere, or cut it into chunks
        return any(
            len(tensor) in (rows, rows * length) and tensor.numel() >= rows * length for rows, length in self.shapes
        )

    def _unpack(self, saved: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        device, held = saved
        if held.is_meta:
            return torch.empty_like(held, device=device)
        return held.to(device, non_blocking=True)
