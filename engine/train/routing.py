"""The routers of a mixture of experts in one optimizer step: the loss that balances them, and the load of experts.

The load-balancing loss is one of whole steps, as the preference loss is: over all tokens of all packs, accumulation
steps and processes, so that no division into packs changes it. Its gradient needs to know which experts all those
tokens chose before the first backward pass. A step of one pack on one process knows that from its own forward; any
other makes a first pass without gradients. TRL computes the loss of every micro-batch and averages: the same where a
step is one micro-batch of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpo_kernels.head import Head

from .. import distributed
from ..config.schema import LossConfig
from ..model import Policy
from ..model.balance import Balance
from ..model.experts import counting_experts
from ..model.routers import RouterSums, balance_loss
from ..packing import PackedBatch
from .feed import TrainingPack

R = TypeVar("R")


class Routing:
    """Runs the packs of a step, or of an evaluation, and gathers what their routers did.

    For a model without experts that is nothing, and packs run as they would without this.
    """

    def __init__(self, policy: Policy, loss: LossConfig, *, count_experts: bool = False):
        self.policy = policy
        self.balance = Balance.of(policy, loss.router_aux_loss_coef)
        self._counts_experts = count_experts
        self._total: RouterSums | None = None
        self._seen: RouterSums | None = None
        self._newest: RouterSums | None = None
        self._chosen: list[Tensor] = []

    def look_ahead(self, packs: Sequence[TrainingPack]) -> None:
        """Find out what all tokens of the step choose, if the packs alone do not say it. Every rank must call this."""
        if self.balance is None or (len(packs) == 1 and distributed.size() == 1):
            return
        with same_random_numbers(self.policy.device), torch.no_grad():
            for pack in packs:
                self.run(pack.batch, _nothing, counts=pack.counts)
        self.close_first_pass()

    def close_first_pass(self) -> None:
        """What has run until now was all of the step, without gradients; it runs once more."""
        if self._seen is not None:
            self._total, self._seen = _over_ranks(self._seen), None
        self._chosen = []

    def run(
        self, batch: PackedBatch, objective: Callable[[Tensor, Head], R], *, counts: bool = True
    ) -> tuple[R, Tensor | None]:
        """A forward pass.

        Args:
            counts: whether the pack is part of the step.

        Returns:
            What the objective returns; what to add to its loss, or None. Added over all packs that is the coefficient
            times the load-balancing loss of the step.
        """
        if not self._counts_experts:
            return self._run(batch, objective, counts)
        with counting_experts(batch.own_repeats * counts) as count:
            result = self._run(batch, objective, counts)
        # A model in rows shows its experts repeated prompts and padding, block by block.
        layers = [] if self.policy.layout.in_rows else count.layers
        if not layers and self._newest is not None:
            # These experts are not told their tokens, but the routers say them.
            layers = list(self._newest.chosen_LE.double())
        self._chosen = [a + b for a, b in zip(self._chosen, layers, strict=True)] if self._chosen else layers
        return result

    def _run(self, batch: PackedBatch, objective: Callable[[Tensor, Head], R], counts: bool) -> tuple[R, Tensor | None]:
        if self.balance is None:
            return self.policy(batch, objective), None
        result, sums = self.policy(batch, objective, top_k=self.balance.top_k)
        sums = sums.scaled(counts)
        self._newest = sums.detach()
        self._seen = self._newest if self._seen is None else self._seen.plus(self._newest)
        total = self._newest if self._total is None else self._total
        return result, self.balance.coefficient * balance_loss(total, sums.probs_E)

    def aux_loss(self) -> Tensor | None:
        """The load-balancing loss of all that ran, over all ranks, which wait for each other: a float64 scalar.

        None without one.
        """
        if self.balance is None:
            return None
        if self._seen is None:
            return torch.zeros((), dtype=torch.float64, device=self.policy.device)
        total = _over_ranks(self._seen)
        return balance_loss(total, total.probs_E)

    def add_to(self, means: Tensor, aux_loss: Tensor | None) -> Tensor:
        """Means of a step or of an evaluation, the loss first, with ``aux_loss`` of it in that of the loss."""
        if self.balance is None or aux_loss is None:
            return means
        return torch.cat([means[:1] + self.balance.coefficient * aux_loss, means[1:]])

    @property
    def expert_tokens(self) -> list[Tensor]:
        """float64 [experts] for each layer with experts: the tokens of this process that went to each."""
        return self._chosen


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Adapters may drop out: a second pass must draw the masks of the first, which runs inside."""
    cuda = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _nothing(hidden_ND: Tensor, head: Head) -> Any:
    return None


def _over_ranks(sums: RouterSums) -> RouterSums:
    """In float64."""
    flat = torch.cat([values.double().reshape(-1) for values in sums])
    flat = distributed.sum_over_ranks(flat)
    parts = flat.split([values.numel() for values in sums])
    return RouterSums(*(part.reshape(values.shape) for part, values in zip(parts, sums, strict=True)))
