"""What tests of adapters share: a pack, and adapters that are no longer where they began."""

from __future__ import annotations

import numpy as np
import torch

from engine.data.groups import PreferenceGroup
from engine.model import Policy
from engine.packing import build_batch


def pack(tokens: int = 300):
    generator = np.random.default_rng(3)

    def draw(size: int) -> np.ndarray:
        return generator.integers(0, tokens, size, dtype=np.int32)

    return build_batch([PreferenceGroup(i, draw(6 + i), (draw(5), draw(9))) for i in range(3)])


def disturb_(policy: Policy, scale: float = 0.1) -> None:
    """Trained adapters: what is trained moves away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
