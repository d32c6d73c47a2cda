from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from engine.config.schema import OptimConfig
from engine.errors import UserError
from engine.train.optimizer import (
    GuardedUpdate,
    build_optimizer,
    build_schedule,
    check_schedule_name,
    decayed_names,
    parameter_groups,
    schedule_names,
)
from engine.train.schedules import SHARES

HF_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
KWARGS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
}


def small_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8))


def models(tiny_model_dir):
    return [small_gpt2(), AutoModelForCausalLM.from_pretrained(tiny_model_dir)]


def test_weight_decay_applies_where_the_trainer_applies_it(tiny_model_dir):
    for model in models(tiny_model_dir):
        expected = set(get_parameter_names(model, [nn.LayerNorm], HF_PATTERNS))
        named = {name for name, _ in model.named_parameters()}
        assert decayed_names(model) == expected & named
        assert decayed_names(model) < named


def test_groups_hold_every_trainable_parameter_once_in_the_order_of_the_names(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    frozen = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    groups, names = parameter_groups(model, weight_decay=0.1)
    flat = [p for group in groups for p in group["params"]]
    assert [id(model.get_parameter(n)) for n in names] == [id(p) for p in flat]
    assert set(names) == {n for n, _ in model.named_parameters()} - {frozen}
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", [n for n in schedule_names() if n not in ("reduce_lr_on_plateau", "greedy")])
@pytest.mark.parametrize("warmup", [0, 4, 0.3])
def test_learning_rate_at_each_step_is_that_of_transformers(name, warmup):
    model, steps = nn.Linear(2, 2), 12
    config = OptimConfig(
        learning_rate=3e-4, lr_scheduler_type=name, warmup_steps=warmup, lr_scheduler_kwargs=KWARGS.get(name)
    )
    optimizer, _ = build_optimizer(model, config)
    update = GuardedUpdate(optimizer, build_schedule(optimizer, config, total_steps=steps), max_grad_norm=1.0)
    theirs = torch.optim.AdamW(model.parameters(), lr=3e-4)
    schedule = get_scheduler(name, theirs, warmup if warmup >= 1 else 4 * (warmup > 0), steps, KWARGS.get(name, {}))
    for _ in range(steps):
        assert update.learning_rate == theirs.param_groups[0]["lr"]
        model(torch.ones(1, 2)).sum().backward()
        update.step(torch.tensor(0.5))
        theirs.step()
        schedule.step()


def test_those_made_here_are_among_the_names_of_transformers():
    assert set(SHARES) < set(schedule_names())


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match=r"'cosin' is not a schedule; did you mean 'cosine'\?"):
        check_schedule_name("cosin")


def test_schedule_that_lacks_an_option_says_which():
    optimizer, _ = build_optimizer(nn.Linear(2, 2), OptimConfig())
    config = OptimConfig(lr_scheduler_type="cosine_with_min_lr")
    with pytest.raises(UserError, match=r"min_lr.*lr_scheduler_kwargs"):
        build_schedule(optimizer, config, total_steps=10)


def test_nothing_to_train_is_an_error():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(model, OptimConfig())


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e6])
def test_update_equals_plain_torch(name, max_grad_norm):
    config = OptimConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=max_grad_norm)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer, _ = build_optimizer(ours, config)
    schedule = build_schedule(optimizer, config, total_steps=100)
    update = GuardedUpdate(optimizer, schedule, max_grad_norm=max_grad_norm)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2) if name == "adamw" else torch.optim.RMSprop(groups, lr=1e-2)
    plain_schedule = get_scheduler("linear", plain, 0, 100)
    for _ in range(5):
        x = torch.randn(6, 4)
        norms = []
        for model in (ours, theirs):
            model(x).square().sum().backward()
        norms.append(update.step(torch.tensor(1.0)))
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or float("inf")))
        plain.step()
        plain_schedule.step()
        plain.zero_grad()
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_that_is_not_finite_reaches_the_weights(name, where):
    model = nn.Linear(2, 2)
    config = OptimConfig(optimizer=name)
    optimizer, _ = build_optimizer(model, config)
    update = GuardedUpdate(optimizer, build_schedule(optimizer, config, total_steps=3), max_grad_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    if where == "gradient":
        model.weight.grad[0, 0] = float("inf")
    update.step(torch.tensor(float("nan") if where == "loss" else 1.0))
    assert not update.ok()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_deferred_verdict_skips_the_failed_step_and_all_later_ones(monkeypatch):
    monkeypatch.setattr(GuardedUpdate, "deferred", True)
    model = nn.Linear(2, 2)
    config = OptimConfig(learning_rate=0.1, lr_scheduler_type="constant")
    optimizer, _ = build_optimizer(model, config)
    update = GuardedUpdate(optimizer, build_schedule(optimizer, config, total_steps=3), max_grad_norm=1.0)

    def step(scale: float) -> list[torch.Tensor]:
        (model(torch.ones(1, 2)).sum() * scale).backward()
        update.step(torch.tensor(1.0))
        return [p.detach().clone() for p in model.parameters()]

    first = step(1.0)
    assert update.ok()
    for scale in (float("inf"), 1.0):
        after = step(scale)
        assert all(torch.equal(a, b) for a, b in zip(first, after, strict=True))
    assert not update.ok()
