"""Weights in bfloat16 learn what float32 weights learn, under every optimizer, and resume to the same bits."""

from __future__ import annotations

import gc
import importlib.util
import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.config import build_config
from engine.config.schema import OptimConfig
from engine.errors import UserError
from engine.train import held_weights
from engine.train.bfloat16 import carried, counted_noise, joined, noise_key
from engine.train.loop import train
from engine.train.optimizer import GuardedUpdate, build_optimizer, build_schedule
from tests.engine.train.test_resume import assert_resumes_exactly
from tests.pretended_cuda import CUDA, OnDevice, on_host, pretended_cuda

HELD = ["stochastic", "kahan"]
BITSANDBYTES = ("adamw_8bit", "paged_adamw")
OPTIMIZERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing"
        ),
    )
    for name in ("adamw", "rmsprop", *BITSANDBYTES)
]


def small_model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 8)).to(dtype)


def update_of(model: nn.Module, config: OptimConfig, **options) -> GuardedUpdate:
    optimizer, _ = build_optimizer(model, config, **options)
    schedule = build_schedule(optimizer, replace(config, lr_scheduler_type="constant"), total_steps=1000)
    return GuardedUpdate(optimizer, schedule, max_grad_norm=config.max_grad_norm)


def gradients(model: nn.Module, step: int) -> None:
    """The same for a model in any dtype."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


@pytest.mark.parametrize("held", ["plain", *HELD])
def test_at_a_learning_rate_of_1e_6_weights_move(held):
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    config = OptimConfig(learning_rate=1e-6, master_weights="float32" if held == "plain" else held)
    update = update_of(model, config)
    for _ in range(300):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        update.step(torch.tensor(1.0))
    moved = torch.cat([(p - q).double().flatten() for p, q in zip(model.parameters(), before, strict=True)]).detach()
    large = torch.cat([q.flatten() for q in before]).abs() > 2**-7
    if held == "plain":
        assert not moved[large].any()
    else:
        # Steps of 1e-6 down, as Adam takes them where the gradient does not change.
        assert moved[large].mean().item() == pytest.approx(-3e-4, rel=0.1 if held == "stochastic" else 0.5)
        for p, q in zip(model.parameters(), before, strict=True) if held == "kahan" else ():
            exact = joined(p.detach(), update.optimizer.remainders[p])
            torch.testing.assert_close(exact - q.float(), torch.full_like(exact, -3e-4), rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_that_of_float32_weights_rounded_at_random(name, monkeypatch):
    monkeypatch.setattr(held_weights, "TOGETHER", 100)
    config = OptimConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    ours = small_model()
    update = update_of(ours, replace(config, master_weights="stochastic"), seed=5)
    names = [n for n, _ in ours.named_parameters()]
    exact = small_model(torch.float32)
    exact.load_state_dict(ours.state_dict())
    plain = update_of(exact, config)
    for step in range(1, 4):
        gradients(ours, step)
        gradients(exact, step)
        norms = [update.step(torch.tensor(1.0)), plain.step(torch.tensor(1.0))]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        for n, p, q in zip(names, ours.parameters(), exact.parameters(), strict=True):
            noise = counted_noise(noise_key(5, n), 0, q.numel(), q.device, update=step).view(q.shape)
            want = carried(q.detach(), noise)
            assert torch.equal(p.float(), want), n
            q.data.copy_(p.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_what_rounding_leaves_an_update_is_that_of_float32_weights_to_the_bit(name, monkeypatch):
    monkeypatch.setattr(held_weights, "TOGETHER", 100)
    config = OptimConfig(optimizer=name, learning_rate=1e-5, weight_decay=0.1, max_grad_norm=0.0)
    ours, exact = small_model(), small_model(torch.float32)
    exact.load_state_dict(ours.state_dict())
    updates = [update_of(ours, replace(config, master_weights="kahan")), update_of(exact, config)]
    for step in range(4):
        for model, update in zip((ours, exact), updates, strict=True):
            gradients(model, step)
            update.step(torch.tensor(1.0))
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            remainder = updates[0].optimizer.remainders[p]
            assert torch.equal(joined(p.detach(), remainder), q)
            assert (p.float() - q).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * q.abs().max()


def test_a_gradient_of_several_passes_is_summed_in_float32():
    model = small_model()
    update = update_of(model, OptimConfig(master_weights="stochastic"))
    inputs = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    for passes, dtype in ((1, torch.bfloat16), (3, torch.float32)):
        update.passes = passes
        for x in inputs.chunk(passes):
            model(x).float().sum().backward()
        assert {p.grad.dtype for p in model.parameters()} == {dtype}
        if passes == 3:
            alone = []
            for x in inputs.chunk(passes):
                other = small_model()
                other(x).float().sum().backward()
                alone.append([p.grad.float() for p in other.parameters()])
            for p, *parts in zip(model.parameters(), *alone, strict=True):
                assert torch.equal(p.grad, parts[0] + parts[1] + parts[2])
        model.zero_grad()


@pytest.mark.parametrize("options", [{}, *({"master_weights": held} for held in HELD)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_outlives_a_run(options, name):
    """The next run of a process has the memory of the model and its optimizer."""
    model = small_model(torch.bfloat16 if options else torch.float32)
    paged = name.startswith("paged")
    update = update_of(model, OptimConfig(optimizer=name, offload=not paged, **options))
    model(torch.ones(3, 96, dtype=model[0].weight.dtype)).sum().backward()
    update.step(torch.zeros(()))
    kept = [weakref.ref(x) for x in (update, update.optimizer, model, *model.parameters())]
    del model, update
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


@pytest.mark.parametrize("held", HELD)
def test_what_is_not_finite_leaves_weights_alone(held, monkeypatch):
    monkeypatch.setattr(GuardedUpdate, "deferred", True)
    model = small_model()
    update = update_of(model, OptimConfig(master_weights=held, learning_rate=1e-2))
    gradients(model, 0)
    update.step(torch.tensor(1.0))
    before = [p.detach().clone() for p in model.parameters()]
    for loss in (float("nan"), 1.0):
        gradients(model, 1)
        update.step(torch.tensor(loss))
    assert not update.ok()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


SECTIONS = {
    "full": {},
    "lora": {"model": {"lora": {"r": 4, "modules_to_save": ["lm_head"]}}},
    "rmsprop": {"optim": {"optimizer": "rmsprop", "learning_rate": 1e-4}},
    "8 bits": {"optim": {"optimizer": "adamw_8bit"}},
}


def held_config(make_config, held: str, **sections):
    model = {"dtype": "bfloat16", **sections.pop("model", {})}
    return make_config(model=model, optim={"master_weights": held, **sections.pop("optim", {})}, **sections)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("case", SECTIONS)
def test_a_run_resumes_to_the_same_bits(case, held, make_config, tmp_path, monkeypatch):
    if case == "8 bits":
        pytest.importorskip("bitsandbytes")

    def make(**sections):
        return held_config(make_config, held, **{k: dict(v) for k, v in (SECTIONS[case] | sections).items()})

    assert_resumes_exactly(make, tmp_path, monkeypatch)
    (weights,) = (tmp_path / "whole").glob("*.safetensors")
    stored = {t.dtype for t in load_file(weights).values()}
    assert stored == {torch.bfloat16}
    checkpoint = max((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert torch.bfloat16 not in {t.dtype for t in moments.values()}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_run_learns_what_one_with_float32_weights_learns(held, lora, make_config, rows_of, tmp_path):
    losses = {}
    for weights in ("float32", held):
        train_ = {"output_dir": str(tmp_path / weights), "num_train_epochs": 3}
        optim = {"learning_rate": 1e-3 if lora else 2e-4}
        config = held_config(make_config, weights, model={"lora": lora}, optim=optim, train=train_)
        train(config)
        losses[weights] = [row["loss"] for row in rows_of(config)]
    fall = losses["float32"][0] - losses["float32"][-1]
    assert fall > 0.02
    assert losses[held] == pytest.approx(losses["float32"], abs=0.2 * fall)
    assert json.loads((tmp_path / held / "config.json").read_text())["dtype"] == "bfloat16" if lora is None else True


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"dtype": "float32"}}, r"stochastic holds weights in bfloat16, and model\.dtype is float32"),
        ({"optim": {"optimizer": "paged_adamw", "offload": True}}, r"optim\.offload to false, or.* to adamw"),
        ({"reference": {"sync_ref_model": True}}, r"would move a reference by less.*sync_ref_model to false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections, message):
    values = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}}
    values |= {"optim": {"master_weights": "stochastic"}}
    merged = {name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}}
    with pytest.raises(UserError, match=message):
        build_config(merged, "test")


@pytest.mark.parametrize("case", ["float32", "kahan", "8 bits"])
def test_state_on_the_host_changes_no_bit_and_loads_where_it_was_not(case, make_config, tmp_path, monkeypatch):
    if case == "8 bits":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(held_weights, "TOGETHER", 3000)
    weights, optimizer = ("float32", "adamw_8bit") if case == "8 bits" else (case, "adamw")
    optim = {"optimizer": optimizer, "weight_decay": 0.1, "lr_scheduler_type": "constant"}

    def run(name: str, offload: bool, steps: int, **options) -> None:
        train_ = {"output_dir": str(tmp_path / name), "save_steps": 2, "max_steps": steps}
        train(held_config(make_config, weights, optim={**optim, "offload": offload}, train=train_), **options)

    run("device", False, 4)
    run("host", True, 4)
    for name, first in (("left", True), ("came", False)):
        run(name, first, 2)
        run(name, not first, 4, resume=True)
    for file in ("model.safetensors", "checkpoint-4/optimizer.safetensors"):
        want = load_file(tmp_path / "device" / file)
        for name in ("host", "left", "came"):
            found = load_file(tmp_path / name / file)
            assert found.keys() == want.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in want.items())


def test_state_waits_on_the_host(monkeypatch):
    """Seen by what is copied: between updates no moment and no remainder is on the device."""
    monkeypatch.setattr(held_weights, "TOGETHER", 5000)
    model = small_model()
    with pretended_cuda() as cuda:
        cuda.take(model)
        update = update_of(model, OptimConfig(master_weights="kahan", offload=True))
        for step in range(2):
            gradients(model, step)
            for p in model.parameters():
                p.grad = OnDevice(p.grad)
            cuda.copies.clear()
            update.step(torch.zeros((), device=CUDA))
        large = model[0].weight
        assert {type(v) for v in update.optimizer.state[large].values() if v.ndim} == {torch.Tensor}
        assert type(update.optimizer.remainders[large]) is torch.Tensor
        assert sorted(cuda.copies) == [2 * large.numel(), 4 * large.numel(), 4 * large.numel()]


def test_state_that_was_loaded_waits_in_page_locked_memory(monkeypatch):
    """Nobody waits for the copies of a run that goes on, either."""
    with pretended_cuda() as cuda:
        model = small_model()
        cuda.take(model)
        config = OptimConfig(master_weights="kahan", offload=True)
        update = update_of(model, config)
        stored = None
        for step in range(2):
            gradients(model, step)
            for p in model.parameters():
                p.grad = OnDevice(p.grad)
            update.step(torch.zeros((), device=CUDA))
            if stored is None:
                with cuda.waiting():
                    stored = update.optimizer.state_dict()
                    stored["state"] = {
                        i: {slot: on_host(value).clone() for slot, value in slots.items()}
                        for i, slots in stored["state"].items()
                    }
                    cuda.finish()
                    update = update_of(model, config)
                    update.optimizer.load_state_dict(stored)
