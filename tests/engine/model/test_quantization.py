"""Checkpoints whose weights are stored in few bits: refused before anything is read, where they would be trained."""

from __future__ import annotations

import json
import shutil

import pytest

from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.model.quantization import check_trainable, stored_quantization
from engine.train.setup import prepare
from tests.engine.train.conftest import default_config

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
