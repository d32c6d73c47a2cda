"""What is loaded, what is refused, and the checks before a model is trusted with packs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine import hub
from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.model import check_packing, load_adapter, load_policy, load_tokenizer, sources
from engine.model.load import disable_dropout
from tests.conformance import families as conformance
from tests.engine.model.families import tiny_model

CPU = torch.device("cpu")
KEEP_FLOAT32 = ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "beam", "flint")
"""Families that keep routers, sinks or correction biases in float32, in some versions of transformers."""
NOISE = {
    "opt": {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.2},
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.3},
}


def test_code_of_a_model_names_the_key_that_runs_it(tmp_path, tiny_model_dir):
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.Tok", None]}
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((tmp_path / name).read_text())
        values |= {"auto_map": own, "model_type": "own", "tokenizer_class": "Tok"}
        (tmp_path / name).write_text(json.dumps(values))
    (tmp_path / "own.py").write_text("raise AssertionError('it was run')\n")
    model = ModelConfig(model_name_or_path=str(tmp_path))
    message = r"^model\.model_name_or_path=.* comes with Python code .* set model\.trust_remote_code to true"
    for load in (lambda: load_policy(model, device=CPU), lambda: load_tokenizer(model)):
        with pytest.raises(UserError, match=message):
            load()


def saved(folder, family, **overrides) -> ModelConfig:
    tiny_model(family, **overrides).save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(folder), dtype="float32")


def test_no_bar_of_reading_weights(tmp_path, monkeypatch, capfd):
    """But those of downloads, which take minutes."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    hidden = are_progress_bars_disabled()
    load_policy(saved(tmp_path, "llama"), device=CPU)
    assert "Loading weights" not in capfd.readouterr().err
    assert are_progress_bars_disabled() == hidden


@pytest.mark.parametrize("family", NOISE)
def test_training_mode_computes_what_evaluation_does(family, tmp_path):
    model = tiny_model(family, **NOISE[family]).train()
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 23)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    policy = load_policy(saved(tmp_path, family, **NOISE[family]), device=CPU)
    assert policy.disabled_dropouts > 0
    assert disable_dropout(policy) == 0
    check_packing(policy)


def test_noise_that_cannot_be_switched_off_is_refused(tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    policy = load_policy(saved(tmp_path, "llama"), device=CPU)
    policy.causal_lm.model.norm = nn.Sequential(policy.causal_lm.model.norm, Noisy())
    with pytest.raises(UserError, match="LlamaForCausalLM gives other log-probs in training mode"):
        check_packing(policy)


def test_a_model_that_mixes_tokens_elsewhere_is_refused(tmp_path):
    class Mixing(nn.Module):
        def forward(self, x):
            return x + x.mean(1, keepdim=True)

    policy = load_policy(saved(tmp_path, "llama"), device=CPU)
    policy.causal_lm.model.norm = nn.Sequential(policy.causal_lm.model.norm, Mixing())
    with pytest.raises(UserError, match="LlamaForCausalLM leaks tokens between responses"):
        check_packing(policy)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_model_that_never_calls_the_attention_function_runs_in_rows(family, tmp_path):
    sizes = {"n_head": 4, "n_layer": 2, "head_dim": None, "num_key_value_heads": None}
    policy = load_policy(saved(tmp_path, family, **sizes), device=CPU)
    with pytest.raises(UserError, match=f"{type(policy.causal_lm).__name__} .*; set packing.layout to auto"):
        check_packing(policy, requested="shared")
    check_packing(policy)
    assert policy.layout.kind == "rows"


@pytest.mark.parametrize("with_adapter", [False, True])
def test_an_adapter_keeps_its_own_scale(with_adapter, tmp_path):
    base = saved(tmp_path / "base", "llama")
    trained = load_policy(ModelConfig(**(vars(base) | {"lora": LoraConfig(r=3, alpha=24)})), device=CPU)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    trained.model.save_pretrained(tmp_path / "adapter")
    other = LoraConfig(r=2, alpha=2) if with_adapter else None
    policy = load_policy(ModelConfig(**(vars(base) | {"lora": other})), device=CPU)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = policy.causal_lm(input_ids=ids, attention_plan=_plan(ids)).logits
        load_adapter(policy, tmp_path / "adapter")
        expected = trained.causal_lm(input_ids=ids, attention_plan=_plan(ids)).logits
        torch.testing.assert_close(policy.causal_lm(input_ids=ids, attention_plan=_plan(ids)).logits, expected)
        with policy.reference_mode():
            assert torch.equal(policy.causal_lm(input_ids=ids, attention_plan=_plan(ids)).logits, plain)


def _plan(ids):
    from engine.packing.layout import Segment, plan_attention

    return plan_attention([Segment(0, ids.shape[1], 0, 0)])


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    base = saved(tmp_path / "base", "llama")
    lora = LoraConfig(r=3, target_modules=("q_proj",))
    trained = load_policy(ModelConfig(**(vars(base) | {"lora": lora})), device=CPU)
    trained.model.save_pretrained(tmp_path / "adapter")
    deeper = load_policy(saved(tmp_path / "deeper", "llama", num_hidden_layers=3), device=CPU)
    with pytest.raises(UserError, match="adapter does not fit LlamaForCausalLM: it belongs to other layers"):
        load_adapter(deeper, tmp_path / "adapter")
    wider = load_policy(saved(tmp_path / "wider", "llama", hidden_size=64), device=CPU)
    with pytest.raises(UserError, match="adapter does not fit LlamaForCausalLM"):
        load_adapter(wider, tmp_path / "adapter")


def test_an_adapter_is_not_a_model(tmp_path):
    base = saved(tmp_path / "base", "llama")
    load_policy(ModelConfig(**(vars(base) | {"lora": LoraConfig(r=3)})), device=CPU).model.save_pretrained(
        tmp_path / "adapter"
    )
    message = r"adapter is an adapter, not a model: give the base model here and.*adapter_name_or_path"
    with pytest.raises(UserError, match=message):
        load_policy(ModelConfig(model_name_or_path=str(tmp_path / "adapter")), device=CPU)
    # It has no tokenizer either, which is not what is wrong.
    with pytest.raises(UserError, match=message):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path / "adapter")))


def test_what_does_not_load_is_named(tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match=r"model\.model_name_or_path=.*nowhere is not a folder"):
        load_policy(ModelConfig(model_name_or_path=str(tmp_path / "nowhere")), device=CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty does not load as a causal language model"):
        load_policy(ModelConfig(model_name_or_path=str(tmp_path / "empty")), device=CPU)
    damaged = shutil.copytree(tiny_model_dir, tmp_path / "damaged")
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged does not load .*: model\.safetensors is damaged .*; copy it again"):
        load_policy(ModelConfig(model_name_or_path=str(damaged)), device=CPU)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, bare)
    with pytest.raises(
        UserError, match=r"bare has no tokenizer that loads: the folder has no file of one.*model\.token"
    ):
        load_tokenizer(ModelConfig(model_name_or_path=str(bare)))


def test_a_name_that_is_no_folder_and_not_on_the_hub():
    config = ModelConfig(model_name_or_path="models/nope", dtype="float32")
    for load in (load_tokenizer, lambda c: load_policy(c, device=torch.device("cpu"))):
        with pytest.raises(UserError, match=r"model_name_or_path=models/nope is no folder here.*check the path"):
            load(config)


def test_without_a_connection_the_cache_answers(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sources, "unreachable", lambda endpoint: "Network is unreachable")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file: str(tmp_path / file) if (name, file) == ("some/model", "config.json") else None,
    )
    assert sources.hub_options("some/model", "--model ") == {"local_files_only": True}
    assert "some/model is read from the Hub's cache" in caplog.text
    assert sources.hub_options(str(tmp_path), "--model ") == {}
    with pytest.raises(UserError, match=r"^--model other/model is no folder here and not in.*unreachable"):
        sources.hub_options("other/model", "--model ")


def test_a_connection_is_tried_once_and_not_past_a_proxy(monkeypatch):
    def refuse(address, timeout):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.delenv("ALL_PROXY", raising=False)
    hub.unreachable.cache_clear()
    assert hub.unreachable("https://hub.test") == "Connection refused"
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy.test"})
    hub.unreachable.cache_clear()
    assert hub.unreachable("https://hub.test") is None
    hub.unreachable.cache_clear()


@pytest.mark.parametrize("family", [family for family in KEEP_FLOAT32 if family in CONFIG_MAPPING])
@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_every_weight_has_the_dtype_that_transformers_loads(family, lora, tmp_path):
    """A frozen base is held as ``from_pretrained(dtype=bfloat16)`` holds it, what is trained in float32."""
    conformance.tiny_model(conformance.tiny_config(family)).save_pretrained(tmp_path)
    model = ModelConfig(
        model_name_or_path=str(tmp_path), dtype="bfloat16", lora=None if lora is None else LoraConfig(**lora)
    )
    dtype = torch.float32 if lora is None else torch.bfloat16
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    tensors = load_policy(model, device=CPU).causal_lm.state_dict().items()
    found = {name.replace(".base_layer", ""): tensor for name, tensor in tensors if "lora_" not in name}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_the_first_layers_of_a_model_whose_last_share_keys(tmp_path, family):
    conformance.tiny_config(family).save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path), dtype="float32")
    for layers in (1, 2):
        policy = load_policy(model, device=CPU, empty=True, layers=layers)
        assert len(policy.causal_lm.model.layers) == layers


def test_a_text_model_that_only_its_own_class_reads(tmp_path):
    """The automatic classes know the composite that it is of."""
    conformance.tiny_model(conformance.tiny_config("emu3")).save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path), dtype="float32")
    policies = [load_policy(model, device=CPU, empty=empty) for empty in (False, True)]
    assert [type(policy.causal_lm).__name__ for policy in policies] == ["Emu3ForCausalLM"] * 2
    check_packing(policies[0])
    assert policies[0].layout.kind == "shared"


def test_a_model_that_ends_with_any_of_several_tokens_is_checked(tmp_path):
    tiny_model("llama", eos_token_id=[2, 5]).save_pretrained(tmp_path)
    check_packing(load_policy(ModelConfig(model_name_or_path=str(tmp_path)), device=CPU))
