"""Adapters that cannot be read, or for which there is no memory, give one line that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config.schema import ModelConfig
from engine.errors import UserError
from engine.model import load_policy
from engine.model.adapter_forms import base_of_adapter, changes_base
from engine.model.adapters import load_adapter
from engine.model.fresh import _score

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")


@pytest.fixture
def adapter(tiny_model_dir, tmp_path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def ways(tiny_model_dir, adapter) -> dict:
    """What reads an adapter, by name."""
    model = ModelConfig(model_name_or_path=str(tiny_model_dir))
    continued = ModelConfig(model_name_or_path=str(tiny_model_dir), adapter_name_or_path=str(adapter))
    return {
        "base": lambda: base_of_adapter(str(adapter)),
        "change": lambda: changes_base(str(adapter)),
        "continue": lambda: load_policy(continued, device=CPU),
        "put": lambda: load_adapter(load_policy(model, device=CPU), adapter),
    }


DAMAGED = [
    *(("adapter_model.safetensors", way) for way in ("change", "continue", "put")),
    *(("adapter_config.json", way) for way in ("base", "change", "continue", "put")),
]


@pytest.mark.parametrize(("name", "way"), DAMAGED)
@pytest.mark.parametrize("content", [b"{", b"no weights", b"\xff\xff"])
def test_a_damaged_file_is_one_line(content, name, way, adapter, ways):
    (adapter / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        ways[way]()
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_found_by_the_plain_load(adapter, tiny_model_dir):
    (adapter / "adapter_model.safetensors").write_bytes(b"no weights")
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), adapter_name_or_path=str(adapter))
    assert "header" in _score(model, [], CPU).trouble


@pytest.mark.parametrize("way", ["continue", "put", "plain"])
def test_a_full_device_is_no_fault_of_an_adapter(way, ways, adapter, tiny_model_dir, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", full)
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), adapter_name_or_path=str(adapter))
    with pytest.raises(torch.OutOfMemoryError):
        ways[way]() if way in ways else _score(model, [], CPU)
