"""One backward pass before training: what refuses is named, and nothing is left of it."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import BackendError, UserError
from engine.model import backward, check_packing, load_policy
from engine.model.attention import Backend, choice
from engine.model.backward import check_backward
from tests.conformance.families import tiny_config, tiny_model
from tests.engine.model import stand_ins
from tests.engine.model.kernel_stand_ins import HOPPER, NO_GRADIENTS, install_all
from tests.engine.model.test_attention_kernels import policy_on

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saves a tiny model of a family once."""
    found: dict[str, str] = {}

    def save(family: str) -> str:
        if family not in found:
            torch.manual_seed(0)
            found[family] = str(tmp_path_factory.mktemp(family))
            config = tiny_config(family)
            if family == "mamba2":
                config.chunk_size, config.num_hidden_layers = 32, 1
            tiny_model(config).save_pretrained(found[family])
        return found[family]

    return save


def load(folder: str, how: bool | str = False, lora: LoraConfig | None = None):
    model = ModelConfig(model_name_or_path=folder, dtype="float32", lora=lora)
    policy = load_policy(model, device=CPU, gradient_checkpointing=how)
    check_packing(policy)
    return policy


@pytest.mark.parametrize(
    ("family", "how"),
    [("qwen3_5_text", False), ("qwen3_5_text", True), ("qwen3_5_text", "selective"), ("mamba2", True)],
)
def test_kernels_without_gradients_are_named(family, how, folders, monkeypatch):
    folder = folders(family)
    install_all(monkeypatch, sys.modules[type(tiny_model(tiny_config(family))).__module__], NO_GRADIENTS)
    policy = load(folder, how)
    assert f"raises RuntimeError with its gradients: {HOPPER}" in policy.layout.padded_for
    mixer = policy.layout.mixers[0]
    words = f"cannot train on packs: the backward pass of {mixer} raises RuntimeError: "
    with pytest.raises(UserError, match=words) as caught:
        check_backward(policy)
    assert HOPPER in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("family", ["lfm2", "bloom", "qwen3_moe"])
@pytest.mark.parametrize("how", [False, True])
def test_nothing_is_left_of_it(family, how, folders, monkeypatch):
    monkeypatch.setattr(choice, "KERNEL_DEVICES", ("cpu", "cuda"))
    policy = load(folders(family), how, LoraConfig(r=2, dropout=0.5) if family == "lfm2" else None)
    policy.train()
    calls = []
    take = backward._take_gradient
    monkeypatch.setattr(backward, "_take_gradient", lambda *args: calls.append(args) or take(*args))

    def state():
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in policy.modules()]
        tensors = [*policy.parameters(), *policy.buffers()]
        return modules, [x.tolist() for x in tensors], torch.get_rng_state().tolist(), random.getstate(), policy.layout

    numbers, before = np.random.get_state()[1].copy(), state()
    check_backward(policy)
    assert len(calls) == 1
    assert state() == before
    assert (np.random.get_state()[1] == numbers).all()
    assert all(p.grad is None for p in policy.parameters())


def test_attention_without_gradients_names_the_option(monkeypatch):
    stand_ins.install(monkeypatch)
    refusal = "FlashAttention backward for head dim > 192 requires A100/A800 or H100/H800"

    def refuse(*unused):
        raise RuntimeError(refusal)

    monkeypatch.setattr(stand_ins._Kernel, "backward", refuse)
    policy = policy_on(Backend("flash", "first choice", ("sdpa",)), tiny_model(tiny_config("llama")))
    with pytest.raises(BackendError) as caught:
        check_backward(policy)
    monkeypatch.undo()
    choice._probe.cache_clear()
    assert str(caught.value) == (
        f"attention backend flash fails in the backward pass of LlamaAttention: RuntimeError: {refusal}; "
        "set model.attention to another of flash3, flash, varlen, flex, native, sdpa, and see `dpo doctor`"
    )


def test_whole_packs_on_the_cpu_are_not_tried(folders, monkeypatch):
    policy = load(folders("llama"))
    monkeypatch.setattr(backward, "_take_gradient", None)
    check_backward(policy)


def test_memory_that_is_used_up_is_no_refusal(folders, monkeypatch):
    policy = load(folders("lfm2"))

    def take(*unused):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(backward, "_take_gradient", take)
    with pytest.raises(torch.OutOfMemoryError):
        check_backward(policy)


@pytest.mark.parametrize(("module", "package"), [("yaml.loader", "PyYAML"), ("torch.library", None), ("nowhere", None)])
def test_the_package_that_raised_is_named(module, package):
    names = {"__name__": module}
    exec("def fail():\n    raise RuntimeError", names)
    with pytest.raises(RuntimeError) as caught:
        names["fail"]()
    assert backward._package(caught.value) == package
