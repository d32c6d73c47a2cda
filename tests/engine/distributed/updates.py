"""Updates of one small model by every way to hold weights and optimizer state, spread over the processes there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine import distributed
from engine.config.schema import OptimConfig
from engine.train.optimizer import GuardedUpdate, build_optimizer, build_schedule
from engine.train.optimizer_state import state_tensors

CASES: dict[str, dict[str, Any]] = {
    "stochastic": {"master_weights": "stochastic"},
    "kahan": {"master_weights": "kahan"},
    "offload": {"offload": True},
    "kahan offload": {"master_weights": "kahan", "offload": True},
    "stochastic rmsprop": {"master_weights": "stochastic", "optimizer": "rmsprop"},
}
STEPS = 3


class Layers(nn.Module):
    """Weights whose rows two and three processes share unevenly, and are not whole blocks of 256."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 320), nn.LayerNorm(320)
        self.up, self.down = nn.Linear(320, 37), nn.Linear(37, 320, bias=False)
        self.wide = nn.Linear(512, 33)


def update(case: str) -> dict[str, Tensor]:
    """Weights and state after some updates with given gradients, gathered."""
    config = OptimConfig(**{"learning_rate": 1e-3, "weight_decay": 0.1, **CASES[case]})
    torch.manual_seed(0)
    model = Layers().to(torch.bfloat16 if config.weights_dtype == "bfloat16" else torch.float32)
    if distributed.size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (distributed.size(),)))
    optimizer, names = build_optimizer(model, config, seed=3)
    # Norms of gradients are summed in another order: what is clipped differs in the last bit.
    schedule = build_schedule(optimizer, config, total_steps=2 * STEPS)
    guarded = GuardedUpdate(optimizer, schedule, max_grad_norm=0.0)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = torch.empty_like(p)
            distributed.copy_full(p.grad, grad)
        guarded.step(torch.tensor(1.0))
    state = state_tensors(optimizer.state_dict()["state"], names)
    found = {name: p.detach() for name, p in model.named_parameters()} | state
    # No backend sends 16-bit integers.
    found = {name: tensor.int() if tensor.dtype == torch.int16 else tensor for name, tensor in found.items()}
    return {name: distributed.full_tensor(tensor) for name, tensor in found.items()}


def save_updates(output: str) -> None:
    for case in CASES:
        torch.save(update(case), Path(f"{output}-{case}.{distributed.rank()}"))
