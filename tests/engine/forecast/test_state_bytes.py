"""What an optimizer keeps of a model, as the forecast has it and as it is."""

from __future__ import annotations

import pytest
import torch

from engine.config.schema import ModelConfig, OptimConfig
from engine.forecast.weights import state_bytes
from engine.model import load_policy
from engine.train.optimizer import build_optimizer
from engine.train.optimizer_state import state_tensors


@pytest.mark.parametrize("master_weights", ["float32", "stochastic", "kahan"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_state_is_what_the_optimizer_keeps(optimizer, master_weights, tiny_model_dir):
    config = OptimConfig(optimizer=optimizer, master_weights=master_weights)
    model = ModelConfig(model_name_or_path=str(tiny_model_dir))
    policy = load_policy(model, device=torch.device("cpu"), weights_dtype=config.weights_dtype)
    forecast, _ = state_bytes(config, policy, kind="cpu")
    real, names = build_optimizer(policy.model, config)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    real.step()
    kept = state_tensors(real.state_dict()["state"], names).values()
    assert sum(forecast) == sum(tensor.nbytes for tensor in kept if tensor.ndim)


def test_offloaded_state_counts_while_it_is_on_the_device(tiny_model_dir):
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=torch.device("cpu"))
    here, update = state_bytes(OptimConfig(), policy, kind="cuda")
    there, more = state_bytes(OptimConfig(offload=True), policy, kind="cuda")
    assert sum(there) == 0
    # The model is so small that all of it is updated together.
    assert more >= sum(here) > update
