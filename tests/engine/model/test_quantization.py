"""Weights in few bits: a base that is quantised as it loads, and checkpoints that are stored so, which are refused
before anything is read, where they would be trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch

from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.model import check_packing, load_policy
from engine.model.quantization import check_trainable, stored_quantization
from engine.reference import model_digest
from engine.train.checkpoint import save_weights
from engine.train.setup import prepare
from tests.engine.model.adapter_setup import disturb_, pack
from tests.engine.train.conftest import default_config

CPU = torch.device("cpu")
STORED = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "a kind that is not known yet": {"quant_method": "a kind that is not known yet"},
}


@pytest.fixture(params=STORED)
def stored(request, tiny_model_dir, tmp_path) -> tuple[str, str]:
    """How a checkpoint is quantised, in words, and its folder, without weights."""
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": STORED[request.param]}))
    return request.param, str(folder)


def test_quantised_weights_are_never_trained_in_full(stored, pairs_jsonl, tmp_path):
    words, folder = stored
    config = default_config(tmp_path, folder, pairs_jsonl, tmp_path / "store", data={"dataset_name": "not/read.json"})
    with pytest.raises(UserError, match=rf"{folder} is stored quantised \({words}\), .*model\.lora"):
        prepare(config)


@pytest.mark.parametrize("place", ["compression_config", "quantization_config of text_config"])
def test_it_is_found_wherever_configs_say_it(place, tiny_model_dir, tmp_path):
    key, _, part = place.partition(" of ")
    said = {key: STORED["gptq, 4 bits"]}
    config = json.loads((tiny_model_dir / "config.json").read_text()) | ({part: said} if part else said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_quantization(ModelConfig(model_name_or_path=str(tmp_path))) == "gptq, 4 bits"


def test_adapters_on_quantised_weights_and_other_checkpoints_are_let_through(stored, tiny_model_dir):
    _, folder = stored
    check_trainable(ModelConfig(model_name_or_path=folder, lora=LoraConfig()))
    check_trainable(ModelConfig(model_name_or_path=folder, adapter_name_or_path="somewhere"))
    check_trainable(ModelConfig(model_name_or_path=str(tiny_model_dir)))
    check_trainable(ModelConfig(model_name_or_path="no/where"))


@pytest.fixture
def base(tiny_model_dir) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32")


def test_quantization_without_its_package_says_what_to_install(base, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(
        UserError, match=r"model\.quantization=nf4 needs bitsandbytes: pip install dpo-kernels\[qlora\]"
    ):
        load_policy(replace(base, quantization="nf4", lora=LoraConfig(r=4)), device=CPU)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_quantised_base(kind, base, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = replace(base, quantization=kind, lora=LoraConfig(r=4))
    policy = load_policy(config, device=CPU)
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in policy.modules())
    assert all(p.dtype == torch.float32 and "lora_" in n for n, p in policy.named_parameters() if p.requires_grad)
    check_packing(policy)
    batch = pack()
    with torch.no_grad():
        before = policy.eval().logps(batch)
        exact = load_policy(base, device=CPU).eval().logps(batch)
    assert 0 < (before - exact).abs().max() < 0.5
    assert model_digest(policy) != model_digest(load_policy(base, device=CPU))
    assert model_digest(policy) == model_digest(load_policy(replace(config, lora=None), device=CPU))
    policy.train().logps(batch).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)
    disturb_(policy)
    save_weights(policy, tmp_path / "saved")
    again = load_policy(replace(config, lora=None, adapter_name_or_path=str(tmp_path / "saved")), device=CPU)
    with torch.no_grad():
        assert torch.equal(again.eval().logps(batch), policy.eval().logps(batch))
        with again.reference_mode():
            assert not torch.equal(again.logps(batch), before)
