"""Trained weights in bfloat16 that still learn, under any optimizer.

An update is made in float32. A few weights at a time are widened, the optimizer updates the float32 copies with
gradients and moments in float32, and the result is rounded back: up or down at random (``optim.master_weights:
stochastic``). So a formula of an optimizer is never written twice, and what it computes is what it computes on float32
weights. No float32 copy outlives the update of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from .bfloat16 import noise_key, round_at_random

UPDATES = "updates"
"""In the groups of an optimizer: how many updates it has made. Groups are part of checkpoints."""
TOGETHER = 1 << 26
"""Weights that are widened at a time, where single ones are not larger."""


class HeldWeights(torch.optim.Optimizer):
    """Mixed into an optimizer: see ``holding``."""

    def hold(self, names: Sequence[str], seed: int) -> None:
        """Called once, after the optimizer is made.

        Args:
            names: of its parameters, in its order.
            seed: of the noise of rounding.
        """
        self.names = dict(zip(self._parameters(), names, strict=True))
        self.seed = seed
        self.divisor: Tensor | None = None
        """Of gradients, to clip them, where the optimizer does not divide by itself."""
        for group in self.param_groups:
            group[UPDATES] = 0
        if (manager := getattr(self, "mng", None)) is not None:
            # bitsandbytes looks for its exceptions among the parameters at its first step, when they are stood in for.
            self.check_overrides()  # type: ignore[attr-defined]
            self.initialized = True
            manager.pid2config.clear()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient, and let go of their gradients."""
        for group in self.param_groups:
            group[UPDATES] += 1
        grads = {p: p.grad for p in self._parameters() if p.grad is not None}
        for p in grads:
            p.grad = None
        for weights in _chunks(grads):
            stand_ins = {p: self._widened(p, grads.pop(p)) for p in weights}
            with self._standing_in(stand_ins):
                super().step()
            for p, updated in stand_ins.items():
                self._take_back(p, updated)

    def _widened(self, p: Tensor, grad: Tensor) -> Tensor:
        """A float32 copy of a parameter with its gradient; of one that is float32 already, an alias."""
        wide = p.detach().float()
        wide.grad = grad.float()
        if self.divisor is not None:
            wide.grad /= self.divisor
        return wide

    def _take_back(self, p: Tensor, updated: Tensor) -> None:
        if p.dtype == torch.float32:
            return
        key = noise_key(self.seed, self.param_groups[0][UPDATES], self.names[p])
        values = distributed.local_tensor(updated)
        round_at_random(distributed.local_tensor(p.detach()), values, key=key, start=distributed.flat_offset(p))

    @contextmanager
    def _standing_in(self, stand_ins: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Inside, the optimizer sees other tensors in the places of some parameters, with their state."""
        self._exchange(stand_ins)
        try:
            yield
        finally:
            self._exchange({stand_in: p for p, stand_in in stand_ins.items()})

    def _exchange(self, by: Mapping[Tensor, Tensor]) -> None:
        for group in self.param_groups:
            group["params"] = [by.get(p, p) for p in group["params"]]
        for p, other in by.items():
            if p in self.state:
                self.state[other] = self.state.pop(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer's own, whose moments stay float32 beside weights that are not."""
        stand_ins = {
            p: torch.zeros((), device=p.device).expand(p.shape) for p in self._parameters() if p.dtype != torch.float32
        }
        with self._standing_in(stand_ins):
            super().load_state_dict(state_dict)


def holding(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class of optimizers, with ``HeldWeights`` mixed in."""
    return type(kind.__name__, (HeldWeights, kind), {})


def _chunks(params: Mapping[Tensor, Any]) -> list[list[Tensor]]:
    """The parameters in order, as many together as ``TOGETHER`` allows."""
    chunks: list[list[Tensor]] = []
    room = 0
    for p in params:
        size = distributed.local_tensor(p).numel()
        if not chunks or size > room:
            chunks.append([])
            room = TOGETHER
        chunks[-1].append(p)
        room -= size
    return chunks


def sum_in_float32(params: Sequence[Tensor], *, passes: Callable[[], int]) -> None:
    """Let gradients of bfloat16 parameters be float32 where they are sums over several backward passes.

    The gradient of one pass is what autograd makes, bfloat16: to add in bfloat16 would lose what later passes bring.

    Args:
        passes: of the step in progress.
    """

    def widen(p: Tensor) -> None:
        if passes() > 1 and p.grad is not None and p.grad.dtype != torch.float32:
            p.grad = p.grad.float()

    for p in params:
        if p.dtype != torch.float32:
            # Any dtype may be assigned; later gradients are added in place.
            p.grad_dtype = None  # type: ignore[attr-defined]
            p.register_post_accumulate_grad_hook(widen)
