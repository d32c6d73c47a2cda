"""What an optimizer keeps of a model, as the forecast has it and as it is."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from engine.config.schema import ModelConfig, OptimConfig
from engine.forecast import weights
from engine.forecast.sharding import largest_share
from engine.forecast.weights import state_bytes
from engine.model import load_policy
from engine.train.optimizer import build_optimizer
from engine.train.optimizer_state import state_tensors


@pytest.mark.parametrize("master_weights", ["float32", "stochastic", "kahan"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "adamw_8bit"])
def test_state_is_what_the_optimizer_keeps(optimizer, master_weights, tiny_model_dir):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    if optimizer not in ("adamw", "rmsprop"):
        pytest.importorskip("bitsandbytes")
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
    # Rows are divided as FSDP divides them: the first process has the most.
    shares = sum(largest_share(size, p, 3) for size, p in zip(forecast, policy.parameters(), strict=True))
    assert shares == sum(tensor.chunk(3)[0].nbytes for tensor in kept if tensor.ndim)


def test_offloaded_state_counts_while_it_is_on_the_device(tiny_model_dir):
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=torch.device("cpu"))
    here, update = state_bytes(OptimConfig(), policy, kind="cuda")
    there, more = state_bytes(OptimConfig(offload=True), policy, kind="cuda")
    assert sum(there) == 0
    # The model is so small that all of it is updated together.
    assert more >= sum(here) > update


@pytest.mark.parametrize(
    ("optim", "bytes_each"), [({}, 4), ({"offload": True}, 4 + 4), ({"master_weights": "stochastic"}, 8 + 4)]
)
def test_an_update_of_all_weights_together_counts_where_no_gpu_is(optim, bytes_each, tiny_model_dir, monkeypatch):
    """RMSprop takes the roots of all second moments at once, or of those whose weights are updated together."""
    monkeypatch.setattr(weights, "TOGETHER", 20_000)
    monkeypatch.setattr(weights, "PIECE", 1)
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=torch.device("cpu"))
    together = 20_000 if optim else sum(p.numel() for p in policy.parameters())
    _, found = state_bytes(OptimConfig(optimizer="rmsprop", **optim), policy, kind="cuda")
    assert bytes_each * together <= found < (bytes_each + 1) * together


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_operators_that_round_take_room_and_kernels_none(kind, tiny_model_dir, monkeypatch):
    pytest.importorskip("triton")
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=torch.device("cpu"))
    numbers = [p.numel() for p in policy.parameters()]
    pieces = min(sum(numbers), weights.PIECE)
    for without, rounded in ((False, 0 if kind == "cuda" else 32 * pieces), (True, 32 * pieces)):
        if without:
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert state_bytes(OptimConfig(master_weights="stochastic"), policy, kind=kind)[1] == pytest.approx(
            8 * sum(numbers) + rounded, rel=1e-3
        )


def test_what_is_updated_together_is_as_much_where_each_process_has_a_share(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(weights, "TOGETHER", 20_000)
    monkeypatch.setattr(weights, "PIECE", 1)
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=torch.device("cpu"))
    largest, whole = max(p.numel() for p in policy.parameters()), sum(p.numel() for p in policy.parameters())
    assert largest < 20_000 < whole / 2
    for optim, each in (({"master_weights": "stochastic"}, 8), ({"offload": True}, 8)):
        (_, alone), (_, shared) = (state_bytes(OptimConfig(**optim), policy, kind="cuda", shards=n) for n in (1, 2))
        assert each * 20_000 <= alone == shared


@pytest.mark.parametrize(
    ("optimizer", "shards", "kept"),
    [
        ("paged_adamw", 1, [0, 8 * 400, 8 * 4096, 8 * 64]),
        ("paged_adamw_8bit", 1, [2 * 4 * 400 * 2, 8 * 400, 2 * (4096 + 4 * 64), 8 * 64]),
        ("paged_adamw_8bit", 4, [2 * (51_200 + 4 * 100 * 2), 8 * 100, 2 * (1024 + 4 * 16), 8 * 16]),
    ],
)
def test_scales_and_small_moments_are_not_paged(optimizer, shards, kept):
    model = nn.Sequential(nn.Linear(512, 400), nn.Linear(64, 64))
    assert state_bytes(OptimConfig(optimizer=optimizer), model, kind="cuda", shards=shards)[0] == kept
