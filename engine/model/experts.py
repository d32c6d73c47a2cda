"""Experts of a mixture in the compute dtype.

Grouped matrix products have no autocast rule: under autocast, experts whose weights are float32 would multiply in
float32, several times slower, and on a GPU expert by expert, with the host waiting in between. The implementation that
is registered here hands transformers' own grouped products the weights and hidden states in the dtype of autocast, as
autocast does for linear layers. Weights stay float32, and so do their gradients. Routers are no experts: what
transformers computes there in float32 stays so. It also counts, where it is asked to, which experts tokens go to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

EXPERTS = "dpo_grouped_mm"
"""The name under which transformers knows it."""


class ExpertCount:
    """How many tokens went to each expert, layer by layer, in the order in which the layers ran."""

    def __init__(self, weights_T: Tensor):
        self._weights_T = weights_T
        self.layers: list[Tensor] = []
        """float64 [experts] each."""

    def add(self, module: nn.Module, top_k_index: Tensor) -> None:
        """Count one layer's choices, [tokens, k]; not those of a layer that sees other rows than the pack's."""
        if len(top_k_index) != len(self._weights_T):
            return
        experts: int = module.num_experts  # type: ignore[assignment]
        # A place more for choices that stand for no expert. A token chooses an expert once: no two writes meet.
        chosen_TE = self._weights_T.new_zeros(len(top_k_index), experts + 1, dtype=torch.float32)
        chosen_TE.scatter_(1, top_k_index.clamp(0, experts), 1.0)
        self.layers.append((chosen_TE[:, :experts] * self._weights_T[:, None]).sum(0, dtype=torch.float64))


_counting: ContextVar[ExpertCount | None] = ContextVar("expert_count", default=None)


@contextmanager
def counting_experts(weights_T: Tensor) -> Iterator[ExpertCount]:
    """Count which experts tokens go to in the forward passes inside.

    Args:
        weights_T: what each token counts.
    """
    count = ExpertCount(weights_T)
    token = _counting.set(count)
    try:
        yield count
    finally:
        _counting.reset(token)


class _Cast:
    """A module whose floating-point tensors are read in another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self._module = module
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def grouped_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ``grouped_mm_experts_forward`` of transformers computes, in the dtype of autocast where that is on.

    Args:
        module: experts with stacked weights, [experts, ...].
        hidden_states: [tokens, features].
        top_k_index: [tokens, k], which experts a token goes to.
        top_k_weights: [tokens, k], what each of them counts.

    Returns:
        [tokens, features], in the dtype of the products.
    """
    if (count := _counting.get()) is not None:
        count.add(module, top_k_index)
    if hidden_states.dtype == torch.float64:
        # torch has no grouped products of it
        return batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    device_type = hidden_states.device.type
    if not torch.is_autocast_enabled(device_type):
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    dtype = torch.get_autocast_dtype(device_type)
    cast: Any = _Cast(module, dtype)
    return grouped_mm_experts_forward(cast, hidden_states.to(dtype), top_k_index, top_k_weights)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of several experts."""
    stacked = any(weight.ndim == 3 for weight in module.parameters(recurse=False))
    return stacked and not isinstance(module, nn.modules.conv._ConvNd)


def register_experts() -> None:
    """Make it known to transformers. Idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_experts)
    # Experts of 8 bits are looked up elsewhere; they have grouped products of their own, which cast what they need.
    ALL_FP8_EXPERTS_FUNCTIONS.register(EXPERTS, ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"])
