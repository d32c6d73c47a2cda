"""The final model of a run."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from engine.model import load_policy
from engine.train.export import export_model


@pytest.mark.parametrize("sharded", [False, True])
def test_the_config_names_the_dtype_of_the_weights(sharded, tiny_model_dir, tiny_tokenizer, tmp_path):
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="bfloat16")
    config = RunConfig(
        model=model, data=DataConfig(dataset_name="rows.jsonl"), train=TrainConfig(output_dir=str(tmp_path))
    )
    policy = load_policy(model, device=torch.device("cpu"))
    # Of one process, whose shards are the whole.
    policy.sharded = sharded
    wanted = {name: tensor.bfloat16() for name, tensor in policy.causal_lm.state_dict().items()}
    export_model(tmp_path, policy, tiny_tokenizer, config, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.config.dtype == loaded.dtype == torch.bfloat16
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
