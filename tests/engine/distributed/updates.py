"""Updates of one small model by every way to hold weights and optimizer state, spread over the processes there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine import distributed
from engine.config.schema import OptimConfig
from engine.train import sharded
from engine.train.checkpoint import OPTIMIZER_FILE, _optimizer_tensors, load_optimizer
from engine.train.optimizer import GuardedUpdate, build_optimizer, build_schedule
from engine.train.optimizer_state import state_tensors

CASES: dict[str, dict[str, Any]] = {
    "stochastic": {"master_weights": "stochastic"},
    "kahan": {"master_weights": "kahan"},
    "offload": {"offload": True},
    "kahan offload": {"master_weights": "kahan", "offload": True},
    "stochastic rmsprop": {"master_weights": "stochastic", "optimizer": "rmsprop"},
}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "8 bits": {"optimizer": "adamw_8bit"},
    "paged": {"optimizer": "paged_adamw"},
    "paged 8 bits": {"optimizer": "paged_adamw_8bit"},
    "8 bits stochastic": {"optimizer": "adamw_8bit", "master_weights": "stochastic"},
    "8 bits kahan offload": {"optimizer": "adamw_8bit", "master_weights": "kahan", "offload": True},
}
if importlib.util.find_spec("bitsandbytes") is not None:
    CASES |= BITSANDBYTES
STEPS, SAVED = 3, 2
"""Updates, and those that are done when state is stored."""


class Layers(nn.Module):
    """Weights whose rows two and three processes share unevenly, and are not whole blocks of 256."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 320), nn.LayerNorm(320)
        self.up, self.down = nn.Linear(320, 37), nn.Linear(37, 320, bias=False)
        self.wide = nn.Linear(512, 33)


def update(case: str, *, source: Path | None = None, target: Path | None = None) -> dict[str, Tensor]:
    """Weights and state after some updates with given gradients, gathered.

    Args:
        source: what another call has stored, to go on from.
        target: where to store what is there after ``SAVED`` updates.
    """
    config = OptimConfig(**{"learning_rate": 1e-3, "weight_decay": 0.1, **CASES[case]})
    torch.manual_seed(0)
    model = Layers().to(torch.bfloat16 if config.weights_dtype == "bfloat16" else torch.float32)
    if distributed.size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (distributed.size(),)))
    optimizer, names = build_optimizer(model, config, seed=3)
    # Norms of gradients are summed in another order: what is clipped differs in the last bit.
    schedule = build_schedule(optimizer, config, total_steps=2 * STEPS)
    guarded = GuardedUpdate(optimizer, schedule, max_grad_norm=0.0)
    if source is not None:
        _restore(source, model, optimizer, names)
    for step in range(SAVED if source else 0, STEPS):
        if step == SAVED and target is not None:
            _store(target, model, optimizer, names)
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


def _store(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    tensors, groups = _optimizer_tensors(optimizer, names)
    weights = {name: distributed.full_tensor(p.detach()) for name, p in model.named_parameters()}
    folder.mkdir(exist_ok=True)
    if distributed.size() > 1:
        sharded.save(folder, {sharded.OPTIMIZER: tensors})
    else:
        save_file(tensors, folder / OPTIMIZER_FILE)
    if distributed.is_main():
        torch.save({"weights": weights, "ranks": distributed.size(), "param_groups": groups}, folder / "rest")


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    stored = torch.load(folder / "rest")
    for name, p in model.named_parameters():
        distributed.copy_full(p, stored["weights"][name])
    load_optimizer(folder, stored, optimizer, names)


def save_updates(output: str) -> None:
    """Those of all cases from their start, and those that go on from what one process has stored."""
    for case in CASES:
        source, target = Path(f"{output}-{case}-1"), Path(f"{output}-{case}-{distributed.size()}")
        for name, found in (("whole", update(case, target=target)), ("resumed", update(case, source=source))):
            torch.save(found, Path(f"{output}-{case}-{name}.{distributed.rank()}"))
