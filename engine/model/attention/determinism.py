"""Fused attention whose gradients are the same to the bit in every run.

The backward passes of torch's fused kernels add up the gradient of the queries in whatever order thread blocks finish,
unless ``torch.use_deterministic_algorithms`` is on while they run. It is switched on around them alone: elsewhere it
would refuse operations that cannot hurt here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Deterministic kernels inside; whatever was set before is set again."""
    state = _read_state()
    _switch_on()
    try:
        yield
    finally:
        _write_state(state)


def attend_deterministically(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """``attend(query, key, value)`` with deterministic kernels in its forward and in its backward pass."""
    states: list[tuple[bool, bool, bool]] = []
    query, key, value = _Leave.apply(states, query, key, value)
    with deterministic_algorithms():
        output = attend(query, key, value)
    result: torch.Tensor = _Enter.apply(states, output)
    return result


class _Enter(torch.autograd.Function):
    """Nothing in the forward pass; the last thing before attention, so its gradient comes first."""

    @staticmethod
    def forward(ctx: Any, states: list, output: torch.Tensor) -> torch.Tensor:
        ctx.states = states
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        ctx.states.append(_read_state())
        _switch_on()
        return None, grads[0]


class _Leave(torch.autograd.Function):
    """Nothing in the forward pass; its backward runs when the gradients of all three inputs are there."""

    @staticmethod
    def forward(ctx: Any, states: list, *inputs: torch.Tensor):
        ctx.states = states
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        _write_state(ctx.states.pop())
        return (None, *grads)


def _read_state() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def _write_state(state: tuple[bool, bool, bool]) -> None:
    mode, warn_only, fill = state
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _switch_on() -> None:
    # cuBLAS is then asked for this, too; read when its first product runs
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # filling every new tensor with NaN would cost a pass over memory each
    _write_state((True, False, False))
