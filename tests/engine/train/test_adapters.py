"""Whole runs that train an adapter from scratch."""

from __future__ import annotations

import math

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.train.loop import train
from tests.engine.train.conftest import assert_same_trajectory


@pytest.mark.parametrize("mode", ["auto", "live"])
def test_an_adapter_is_trained_and_saved_alone(mode, make_config, rows_of, tiny_model_dir, tmp_path):
    import peft

    config = make_config(
        model={"lora": {"r": 4}}, reference={"mode": mode}, optim={"learning_rate": 1e-2}, train={"num_train_epochs": 2}
    )
    train(config)
    rows = rows_of(config)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < 0.6
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = peft.PeftModel.from_pretrained(base, run)
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    assert all("lora_" in name for name in load_file(run / "adapter_model.safetensors"))
    assert "library_name: peft" in (run / "README.md").read_text()


def test_adapter_references_stored_and_live_agree(make_config, rows_of, tmp_path):
    runs = []
    for mode in ("auto", "live"):
        config = make_config(
            model={"lora": {"r": 4}}, reference={"mode": mode}, train={"output_dir": str(tmp_path / mode)}
        )
        train(config)
        runs.append(rows_of(config))
    assert_same_trajectory(*runs, tolerance=2e-5)
