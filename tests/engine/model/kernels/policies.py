"""Tiny policies and packs, and gradients to compare."""

from __future__ import annotations

import torch

from engine.config.schema import ModelConfig
from engine.model import load_policy
from engine.packing import build_batch
from tests.engine.model.test_attention import random_groups

CPU = torch.device("cpu")


def policy_of(folder, *, how=False, **options):
    torch.manual_seed(0)
    model = ModelConfig(model_name_or_path=str(folder), **options)
    return load_policy(model, device=CPU, gradient_checkpointing=how).train()


def gradients(policy, batch) -> list[torch.Tensor]:
    """Log-probs, and the gradient of their sum."""
    policy.zero_grad()
    logps = policy.logps(batch)
    logps.sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]


def assert_close(got, want, bound=1e-5) -> None:
    assert len(got) == len(want) > 1
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= bound * b.norm() + 1e-7


def packs(*counts: int):
    """Packs of so many groups each, of different lengths and numbers of responses."""
    return [build_batch(random_groups(seed)[:count]) for seed, count in enumerate(counts)]
