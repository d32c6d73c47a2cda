"""Activations in host memory: the same numbers, and what is moved."""

from __future__ import annotations

import pytest
import torch

from engine.config.schema import LoraConfig, ModelConfig
from engine.model import load_policy
from engine.model.offload import OffloadedActivations
from tests.engine.model.test_adapters import pack

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_gradients_are_those_of_activations_that_stay(dtype, checkpointing, lora, tiny_model_dir, monkeypatch):
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype=dtype, lora=lora)
    batch = pack()
    weights = set()
    moved: list[torch.Tensor] = []
    pack_one = OffloadedActivations._pack

    def record(self, tensor):
        packed = pack_one(self, tensor)
        if isinstance(packed, tuple):
            moved.append(tensor)
        return packed

    monkeypatch.setattr(OffloadedActivations, "_pack", record)
    results = []
    for offload in (False, True):
        torch.manual_seed(0)
        policy = load_policy(model, device=CPU, gradient_checkpointing=checkpointing).train()
        weights = {p.data_ptr() for p in policy.parameters()}
        policy.activation_offload = offload
        logps = policy.logps(batch)
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
        assert bool(moved) == offload
    assert len(results[0]) == len(results[1]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(tensor.data_ptr() in weights for tensor in moved)
    assert all(batch.num_tokens in tensor.shape for tensor in moved)
    if checkpointing:
        # Only what goes from layer to layer, not what is inside of one.
        assert len(moved) <= 4 * policy.config.num_hidden_layers + 6


def test_nothing_is_saved_without_gradients(tiny_model_dir):
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"), device=CPU)
    batch = pack()
    with torch.no_grad():
        want = policy.logps(batch)
        policy.activation_offload = True
        assert torch.equal(policy.logps(batch), want)
