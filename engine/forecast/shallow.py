"""Models of few layers with random weights, on which what a run will do is tried out."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from ..config.schema import RunConfig
from ..model import Policy, load_policy
from ..model.layouts import use_layout
from ..model.policy import Layout
from ..train.throughput import FlopModel

MEMORY_SHARE = 0.25
"""Of what is free: the most that is taken for a trial."""


def build_policy(config: RunConfig, device: torch.device, layers: int | None) -> Policy:
    """The policy of a run, in training mode, with so many of its layers; where the caller's default device is."""
    policy = load_policy(
        config.model,
        device=device,
        gradient_checkpointing=config.train.gradient_checkpointing,
        empty=True,
        layers=layers,
        weights_dtype=config.optim.weights_dtype,
    )
    policy.activation_offload = config.train.activation_offload
    return policy.train()


def work_of(config: RunConfig, device: torch.device, layout: Layout) -> tuple[FlopModel, int]:
    """The FLOP of a whole model, and the number of weights that are trained, from shapes alone."""
    # How weights are stored changes neither.
    config = replace(config, model=replace(config.model, quantization=None))
    with torch.device("meta"):
        policy = build_policy(config, device, None)
    use_layout(policy, layout)
    return FlopModel.of(policy), sum(p.numel() for p in policy.parameters() if p.requires_grad)


def num_parameters(policy: Policy) -> int:
    """Of the model, all adapters included."""
    return sum(p.numel() for p in policy.parameters())


def check_room(needed: int, layers: str, device: torch.device) -> None:
    """Raise a ``MemoryError`` where ``needed`` bytes are much of what is free."""
    free = free_bytes(device)
    if needed > MEMORY_SHARE * free:
        sizes = f"{needed / 2**30:.1f} of {free / 2**30:.1f} GiB that are free"
        raise MemoryError(f"{layers} would take {sizes}, more than the {MEMORY_SHARE:.0%} that a trial may")


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nothing has taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
