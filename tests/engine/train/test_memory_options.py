"""Optimizers of bitsandbytes, continued adapters and offloaded activations, in whole runs."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.config.schema import OptimConfig
from engine.errors import UserError
from engine.train.loop import train
from engine.train.optimizer import build_optimizer
from engine.train.optimizer_state import slots_of, state_tensors
from tests.engine.train.test_resume import assert_resumes_exactly, run_files

BITSANDBYTES = ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(params=[0.0])
def trained_adapter(request, make_config, tmp_path):
    dropout = request.param
    config = make_config(
        model={"lora": {"r": 4, "alpha": 12, "dropout": dropout}},
        optim={"learning_rate": 1e-2},
        train={"output_dir": str(tmp_path / "first")},
    )
    train(config)
    return tmp_path / "first"


@pytest.mark.parametrize("mode", ["auto", "live"])
def test_a_continued_adapter_starts_at_its_own_reference(mode, trained_adapter, make_config, rows_of, tmp_path):
    model = {"adapter_name_or_path": str(trained_adapter)}
    config = make_config(model=model, reference={"mode": mode}, train={"output_dir": str(tmp_path / mode)})
    train(config)
    rows = rows_of(config)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1e-3
    assert sorted(p.name for p in (tmp_path / mode).glob("*.safetensors")) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("trained_adapter", [0.1], indirect=True)
def test_references_of_a_continued_adapter_stored_and_live_agree(trained_adapter, make_config, rows_of, tmp_path):
    losses = []
    for mode in ("auto", "live"):
        config = make_config(
            model={"adapter_name_or_path": str(trained_adapter)},
            reference={"mode": mode},
            train={"output_dir": str(tmp_path / mode)},
        )
        # Dropout draws from one generator, which a live reference leaves alone.
        train(config)
        losses.append([row["loss"] for row in rows_of(config)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


@pytest.mark.parametrize("trained_adapter", [0.1], indirect=True)
def test_a_continued_adapter_resumes_to_the_same_bits(trained_adapter, make_config, tmp_path, monkeypatch):
    model = {"adapter_name_or_path": str(trained_adapter)}
    assert_resumes_exactly(make_config, tmp_path, monkeypatch, model=model, reference={"mode": "live"})


def test_offloaded_activations_train_to_the_same_bits(make_config, tmp_path):
    for offload in (False, True):
        run = {"output_dir": str(tmp_path / str(offload)), "activation_offload": offload}
        train(make_config(train=run))
    assert run_files(tmp_path / "True") == run_files(tmp_path / "False")


@needs_bitsandbytes
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_bitsandbytes_run_resumes_to_the_same_bits(name, make_config, tmp_path, monkeypatch):
    assert_resumes_exactly(make_config, tmp_path, monkeypatch, optim={"optimizer": name, "learning_rate": 1e-3})


@needs_bitsandbytes
def test_a_quantised_run_trains_and_resumes_to_the_same_bits(make_config, tmp_path, monkeypatch):
    model = {"quantization": "nf4", "lora": {"r": 4}}
    optim = {"optimizer": "paged_adamw_8bit", "learning_rate": 1e-2}
    assert_resumes_exactly(make_config, tmp_path, monkeypatch, model=model, optim=optim)


@needs_bitsandbytes
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_steps_as_torch_does(name):
    torch.manual_seed(0)
    models = [nn.Linear(128, 64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    start = models[0].weight.detach().clone()
    config = OptimConfig(optimizer=name, learning_rate=1e-3, weight_decay=0.1)
    updates = [build_optimizer(models[0], config)[0], build_optimizer(models[1], replace(config, optimizer="adamw"))[0]]
    for _ in range(5):
        x = torch.randn(32, 128)
        for model, optimizer in zip(models, updates, strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = (models[1].weight - start).abs().mean()
    # Moments in 8 bits keep the direction of the update, and its size to a few percent.
    allowed = 0.05 if name.endswith("8bit") else 1e-4
    assert (models[0].weight - models[1].weight).abs().mean() < allowed * moved


@needs_bitsandbytes
def test_embeddings_keep_32_bits():
    import bitsandbytes

    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 128))
    optimizer, names = build_optimizer(model, OptimConfig(optimizer="adamw_8bit"))
    model(torch.arange(10)).sum().backward()
    optimizer.step()
    tensors = state_tensors(optimizer.state_dict()["state"], names)
    assert tensors["state1/0.weight"].dtype == torch.float32
    assert tensors["state1/1.weight"].dtype == torch.uint8
    restored = slots_of(tensors, names)
    assert restored[0]["step"] == 1
    assert isinstance(restored[0]["step"], int)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_missing_package_is_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=rf"optim\.optimizer={name} needs bitsandbytes: pip install dpo-kernels\[qlora\]"
    ):
        build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer=name))


def test_state_that_cannot_be_stored_is_refused():
    with pytest.raises(UserError, match=r"keeps momentum of weight as str.*choose another optim\.optimizer"):
        state_tensors({0: {"momentum": "text"}}, ["weight"])
    shared = torch.ones(3)
    tensors = state_tensors({0: {"table": shared, "step": 3}, 1: {"table": shared}}, ["a", "b"])
    assert tensors["table/a"].data_ptr() != tensors["table/b"].data_ptr()
    assert slots_of(tensors, ["a", "b"])[0]["step"] == 3
