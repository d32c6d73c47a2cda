"""Do fused blocks compute what the model's own compute? Log-probs of a small pack, and every block with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...packing.layout import PackedBatch
from ..policy import Policy
from ..precision import TOKEN_TOLERANCE
from ..side_by_side import results
from .compiled import decoder_blocks
from .exchange import Exchange

_ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 0.2}
"""Largest difference of an output or gradient of a block, as a share of its norm."""
_FLOOR = 1e-2
"""Gradients that are smaller than this share of a block's largest one are rounding, and are held to that share."""


def difference(policy: Policy, exchange: Exchange, batch: PackedBatch) -> str | None:
    """How blocks with an exchange differ by more than rounding from those without, or None. Leaves it on.

    Args:
        batch: on the device of the policy.
    """
    training = policy.training
    try:
        with torch.no_grad(), _no_dropout(policy):
            policy.eval()
            with exchange.plain():
                plain = policy.logps(batch)
            worst = (policy.logps(batch) - plain).abs().max().item()
            # written so that NaN counts as different
            if not worst <= TOKEN_TOLERANCE[policy.compute_dtype]:
                return f"it gives other log-probs, by up to {worst:.3g} nats per token"
            policy.train()
            return _different_block(policy, exchange, batch)
    finally:
        policy.train(training)


def _different_block(policy: Policy, exchange: Exchange, batch: PackedBatch) -> str | None:
    comparisons = []
    for name, block in _named(policy):
        comparison = _Comparison(block, name, exchange, _ALLOWED[policy.compute_dtype])
        comparisons.append(comparison)
        block.forward = comparison  # type: ignore[assignment]
    try:
        policy.logps(batch)
    finally:
        for comparison in comparisons:
            comparison.leave()
    return next((c.found for c in comparisons if c.found), None)


def _named(policy: Policy) -> list[tuple[str, nn.Module]]:
    names = {id(module): name for name, module in policy.causal_lm.named_modules()}
    return [(names[id(block)], block) for block in decoder_blocks(policy)]


class _Comparison:
    """Stands for the forward of a block: computes it in both ways, compares, and gives the plain one's output."""

    def __init__(self, block: nn.Module, name: str, exchange: Exchange, allowed: float):
        self.block = block
        self.name = name
        self.exchange = exchange
        self.allowed = allowed
        self.found = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.leave()
        try:
            _, fused = results(self.block, self.block.forward, args, kwargs)
            with self.exchange.plain():
                output, plain = results(self.block, self.block.forward, args, kwargs)
        finally:
            self.block.forward = self  # type: ignore[assignment]
        inputs = [name for name in plain if name.startswith("gradient of input")]
        largest = max(x.norm() for name, x in plain.items() if name.startswith("gradient"))
        for name, want in plain.items():
            if name in inputs[1:] and name not in fused:
                # after the hidden states come constants, such as cosines of positions
                continue
            got = fused.get(name)
            # written so that NaN counts as different
            if got is None or not bool((got - want).norm() <= self.allowed * max(want.norm(), _FLOOR * largest)):
                self.found = self.found or f"it gives another {name} in {self.name}"
        return output

    def leave(self) -> None:
        """Give the block its forward back: that of the exchange, or of its class."""
        del self.block.forward
        self.exchange.on()


@contextmanager
def _no_dropout(policy: Policy) -> Iterator[None]:
    """That of adapters is drawn in another order where it is compiled."""
    found = [(m, m.p) for m in policy.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    for module, _ in found:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in found:
            module.p = p
