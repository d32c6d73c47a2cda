"""Trained weights in bfloat16 that still learn, under any optimizer.

An update is made in float32. A few weights at a time are widened, the optimizer updates the float32 copies with
gradients and moments in float32, and the result is rounded back: up or down at random (``optim.master_weights:
stochastic``), or to nearest, with what that leaves kept in 16 bits more and added before the next update (``kahan``).
So a formula of an optimizer is never written twice, and what it computes is what it computes on float32 weights. No
float32 copy outlives the update of its weights.

With ``optim.offload`` what an optimizer keeps of each weight waits in host memory between updates, and goes to the
device and back a few weights at a time: the same update, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from .bfloat16 import joined, noise_key, round_at_random, split
from .host_memory import SMALLEST, empty_rows, page_locked, to_device, to_host

UPDATES = "updates"
"""In the groups of an optimizer: how many updates it has made. Groups are part of checkpoints."""
_REMAINDER = "remainder"
"""Among the state of a parameter: what rounding its float32 value left."""
TOGETHER = 1 << 26
"""Weights that are widened at a time, where single ones are not larger."""


class HeldWeights(torch.optim.Optimizer):
    """Mixed into an optimizer: see ``holding``."""

    def hold(self, names: Sequence[str], seed: int, *, compensated: bool, offload: bool) -> None:
        """Called once, after the optimizer is made.

        Args:
            names: of its parameters, in its order.
            seed: of the noise of rounding.
            compensated: keep what rounding to nearest leaves, instead of rounding at random.
            offload: keep moments and remainders in host memory.
        """
        self.offload = offload
        self._on_host: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self._parameters()}
        """Memory of each slot of each parameter."""
        self.names = dict(zip(self._parameters(), names, strict=True))
        self.seed = seed
        held = [p for p in self.names if compensated and p.dtype != torch.float32]
        self.remainders = {p: empty_rows(p, torch.int16, p.shape, on_host=offload).zero_() for p in held}
        self.clip: Tensor | None = None
        """Factor of gradients, where the optimizer does not scale them by itself."""
        for group in self.param_groups:
            group[UPDATES] = 0

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
            if self.offload:
                self._fetch(weights)
            stand_ins = {p: self._widened(p, grads.pop(p)) for p in weights}
            with self._standing_in(stand_ins):
                super().step()
            for p, updated in stand_ins.items():
                self._take_back(p, updated)
            if self.offload:
                self._put_away(weights)

    def _fetch(self, weights: Sequence[Tensor]) -> None:
        """Bring what is kept of some weights to their device."""
        for p in weights:
            mesh = getattr(p, "device_mesh", None)
            slots = self.state.get(p, {})
            for slot in self._on_host[p].keys() & slots.keys():
                slots[slot] = to_device(slots[slot], p.device, mesh)
            if p in self.remainders and p.numel() >= SMALLEST:
                self._on_host[p][_REMAINDER] = self.remainders[p]
                self.remainders[p] = to_device(self.remainders[p], p.device, mesh)

    def _put_away(self, weights: Sequence[Tensor]) -> None:
        """Leave what is kept of some weights on the host."""
        for p in weights:
            held = self._on_host[p]
            slots = self.state[p]
            for slot, value in slots.items():
                # Counters stay, and tables that all weights share.
                if isinstance(value, Tensor) and value.numel() >= SMALLEST:
                    slots[slot] = held[slot] = to_host(value, held.get(slot))
            if _REMAINDER in held:
                self.remainders[p] = to_host(self.remainders[p], held[_REMAINDER])

    def _widened(self, p: Tensor, grad: Tensor) -> Tensor:
        """A float32 copy of a parameter with its gradient; of one that is float32 already, an alias."""
        if (remainder := self.remainders.get(p)) is None:
            wide = p.detach().float()
        else:
            local, wide = distributed.local_tensor, torch.empty_like(p.detach(), dtype=torch.float32)
            joined(local(p.detach()), local(remainder), out=local(wide))
        wide.grad = grad.float()
        if self.clip is not None:
            wide.grad *= self.clip
        return wide

    def _take_back(self, p: Tensor, updated: Tensor) -> None:
        if p.dtype == torch.float32:
            return
        target, values = distributed.local_tensor(p.detach()), distributed.local_tensor(updated)
        if p in self.remainders:
            split(target, distributed.local_tensor(self.remainders[p]), values)
            return
        key, update = noise_key(self.seed, self.names[p]), self.param_groups[0][UPDATES]
        round_at_random(target, values, key=key, start=distributed.flat_offset(p), update=update)

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

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer's own, with the remainders of rounding in the state of each parameter."""
        if self.offload and self._parameters()[0].is_cuda:
            # Copies to the host may be under way.
            torch.cuda.synchronize()
        found = super().state_dict()
        state = {index: dict(slots) for index, slots in found["state"].items()}
        for index, p in enumerate(self.names):
            if p in self.remainders:
                state.setdefault(index, {})[_REMAINDER] = self.remainders[p]
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer's own, whose moments stay float32 beside weights that are not."""
        state = {index: dict(slots) for index, slots in state_dict["state"].items()}
        for index, p in enumerate(self.names):
            if p in self.remainders:
                local = distributed.local_tensor
                local(self.remainders[p]).copy_(local(state[index].pop(_REMAINDER)))
        stand_ins = {
            p: torch.zeros((), device="cpu" if self.offload else p.device).expand(p.shape)
            for p in self._parameters()
            if self.offload or p.dtype != torch.float32
        }
        with self._standing_in(stand_ins):
            super().load_state_dict({**state_dict, "state": state})
        for group in self.param_groups:
            # Absent from what an optimizer wrote that held float32 weights on the device.
            group.setdefault(UPDATES, 0)
        if self.offload:
            for p, slots in self.state.items():
                small = {s: v for s, v in slots.items() if isinstance(v, Tensor) and v.numel() < SMALLEST}
                large = {s: v for s, v in slots.items() if isinstance(v, Tensor) and s not in small}
                self._on_host[p] = {slot: page_locked(value, p.device) for slot, value in large.items()}
                slots |= {slot: value.to(p.device) for slot, value in small.items()} | self._on_host[p]


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
