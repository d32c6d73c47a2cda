"""Of a checkpoint of several models the text model is trained, and the whole comes back with all other bits."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma4VisionConfig

from engine.config.schema import ModelConfig
from engine.model import check_packing, load_policy
from tests.conformance.families import tiny_config
from tests.engine.train.test_export import export

CPU = torch.device("cpu")
PACKED = ("gemma3", "gemma4", "mistral3", "llama4")
ROWS = ("qwen3_5", "qwen3_5_moe")
"""Their mixers of tokens are a matter of layouts; here it is about files."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    def make(family: str):
        if family not in made:
            torch.manual_seed(0)
            config = tiny_config(family)
            if config.vision_config is None:
                sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
                config.vision_config = Gemma4VisionConfig(num_hidden_layers=1, num_key_value_heads=2, **sizes)
            model = AutoModelForImageTextToText.from_config(config).bfloat16()
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    made: dict = {}
    return make


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", [*PACKED, *ROWS])
def test_the_whole_comes_back_with_another_text_model(family, sharded, folders, tmp_path, monkeypatch):
    before = AutoModelForImageTextToText.from_pretrained(folders(family))
    disturbed = {}

    def load(model, device):
        policy = load_policy(model, device=device)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in policy.causal_lm.get_decoder().named_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
                disturbed[name] = parameter
        return policy

    monkeypatch.setattr("tests.engine.train.test_export.load_policy", load)
    policy = export(ModelConfig(model_name_or_path=str(folders(family))), tmp_path / "run", sharded=sharded)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_type"] == json.loads((folders(family) / "config.json").read_text())["model_type"]
    after, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "run", dtype="auto", output_loading_info=True)
    assert type(after) is type(before)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = {id(p) for p in after.get_decoder().parameters()}
    others = {name: p for name, p in after.named_parameters() if id(p) not in text}
    own = dict(before.named_parameters())
    assert others
    for name, parameter in others.items():
        assert torch.equal(parameter.float(), own[name].float()), name
    for name, parameter in after.get_decoder().named_parameters():
        assert torch.equal(parameter, disturbed[name]), name
    head = policy.causal_lm.get_output_embeddings().weight
    assert torch.equal(after.get_output_embeddings().weight.float(), head)


@pytest.mark.parametrize("family", PACKED)
def test_text_trains_on_packs(family, folders):
    policy = load_policy(ModelConfig(model_name_or_path=str(folders(family)), dtype="float32"), device=CPU)
    check_packing(policy)
