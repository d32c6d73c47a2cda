"""How far rounding moves a log-prob, and a model's own forward in float32, whatever it computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

TOKEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of one token's log-prob, in nats, that another packing or backend may cause."""


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """While it is entered, each module computes with float32 copies of its own half-precision parameters.

    A copy exists only while its module runs, so that memory grows by the largest module alone. Quantised weights stay
    as they are. A module whose parameters another one reads is not served: such a forward raises a ``RuntimeError``.
    """
    held: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def widen(module: nn.Module, args: object) -> None:
        held[module] = [
            (p, p.data) for p in module.parameters(recurse=False) if p.dtype in (torch.bfloat16, torch.float16)
        ]
        for parameter, data in held[module]:
            parameter.data = data.float()

    def restore(module: nn.Module, args: object, output: object) -> None:
        for parameter, data in held.pop(module, []):
            parameter.data = data

    handles = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(held):
            restore(module, None, None)
