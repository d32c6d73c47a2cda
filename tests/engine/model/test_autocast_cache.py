"""Weights in the compute dtype are held no longer than something needs them. Bytes are counted, not measured."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config.schema import ModelConfig
from engine.forecast.live_storage import LiveStorage
from engine.model import Policy, load_policy
from engine.packing import build_batch
from tests.engine.model.test_attention import random_groups

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(model_dir, checkpointing: bool = False) -> Policy:
    config = ModelConfig(model_name_or_path=str(model_dir), dtype="bfloat16")
    return load_policy(config, device=CPU, gradient_checkpointing=checkpointing).train()


def held_by_the_body(policy: Policy, *, grad: bool) -> tuple[int, torch.Tensor]:
    """Bytes that are alive when the head is reached, beside the weights, and the hidden states."""
    batch = build_batch(random_groups()[:1])
    count = LiveStorage(CPU, lambda func, args: 0)
    count.watch(policy.parameters())
    before = count.current
    with count, nullcontext() if grad else torch.no_grad():
        held, hidden = policy(batch, lambda hidden, head: (count.current - before, hidden))
    if grad:
        hidden.float().sum().backward()
    return held, hidden.detach()


@pytest.mark.parametrize(("checkpointing", "grad"), [(True, True), (True, False), (False, False)])
def test_no_copy_of_the_weights_outlives_its_layer(checkpointing, grad, model_dir):
    policy = load(model_dir, checkpointing)
    held, _ = held_by_the_body(policy, grad=grad)
    body = sum(p.numel() for p in policy.causal_lm.model.layers.parameters())
    assert held < 0.2 * 2 * body


def test_what_backward_needs_is_held_once_with_and_without_the_cache(model_dir, monkeypatch):
    policy = load(model_dir)
    body = sum(p.numel() for p in policy.causal_lm.model.layers.parameters() if p.ndim == 2)
    held, hidden = held_by_the_body(policy, grad=True)
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert held > 2 * body
    policy.zero_grad()
    monkeypatch.setattr(policy, "recomputes", True)
    without, same = held_by_the_body(policy, grad=True)
    assert without == pytest.approx(held, rel=0.02)
    assert torch.equal(hidden, same)
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(gradients, [p for p in policy.parameters() if p.grad is not None], strict=True)
    )
