"""Adapters: saved alone, read by peft, continued beside a frozen copy, on a full or a quantised base."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.model import check_packing, load_adapter, load_policy
from engine.model.adapter_forms import changes_base, is_adapter
from engine.model.adapters import quiet_loading
from engine.reference import model_digest
from engine.train.checkpoint import save_weights
from tests.conformance.families import tiny_config, tiny_model
from tests.engine.model.adapter_setup import disturb_, pack

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
KINDS = {
    "lora": LoraConfig(r=4),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "dora": LoraConfig(r=4, use_dora=True),
    "head": LoraConfig(r=4, target_modules=("q_proj", "embed_tokens", "lm_head")),
    "copies": LoraConfig(r=4, target_modules=("v_proj",), modules_to_save=("lm_head", "embed_tokens", "norm")),
}


def plain_logps(model, batch) -> torch.Tensor:
    """Log-probs of the completions of a pack from a model's own forward, one sequence at a time."""
    found, cu = [], batch.cu_responses_S1.tolist()
    for k, segment in enumerate(batch.plan.segments):
        rows = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, segment.stop)]
        ids = batch.input_ids_T[rows][None]
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
        size = cu[k + 1] - cu[k]
        found.append(logps[-size - 1 : -1].gather(1, ids[0, -size:, None])[:, 0])
    return torch.cat(found)


@pytest.fixture
def base(tiny_model_dir) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32")


@pytest.fixture
def trained(base, tmp_path) -> Path:
    """The folder of an adapter that changes log-probs, with dropout in its configuration."""
    policy = load_policy(replace(base, lora=LoraConfig(r=4, alpha=12, dropout=0.2)), device=CPU)
    disturb_(policy)
    save_weights(policy, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_peft_the_same_log_probs(kind, base, tmp_path):
    policy = load_policy(replace(base, lora=KINDS[kind]), device=CPU)
    check_packing(policy)
    disturb_(policy)
    save_weights(policy, tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").glob("*.safetensors")} == {"adapter_model.safetensors"}
    other = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "saved").eval()
    batch = pack()
    with torch.no_grad():
        got, want = policy.eval().logps(batch), plain_logps(loaded, batch)
        with policy.reference_mode():
            unadapted = policy.logps(batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (got - unadapted).abs().max() > 1e-2


def test_a_continued_adapter_and_its_reference_are_the_trained_one(base, trained):
    policy = load_policy(replace(base, adapter_name_or_path=str(trained)), device=CPU)
    check_packing(policy)
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    batch = pack()
    with torch.no_grad():
        want = plain_logps(peft.PeftModel.from_pretrained(model, trained).eval(), batch)
        torch.testing.assert_close(policy.eval().logps(batch), want, rtol=0, atol=1e-4)
        disturb_(policy, 0.3)
        moved = policy.logps(batch)
        # The dropout of the trained adapter is not the reference's, whatever the mode.
        with policy.train().reference_mode():
            reference = policy.logps(batch)
    torch.testing.assert_close(reference, want, rtol=0, atol=1e-4)
    assert (moved - want).abs().max() > 1e-2
    assert torch.equal(policy.eval().logps(batch).detach(), moved)


@pytest.fixture
def started(base, tmp_path):
    """``started(init)``: the folder of an adapter that starts in one of peft's ways, and has been trained."""

    def make(init: str | bool, **options) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
        options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options}
        config = peft.LoraConfig(init_lora_weights=init, **options)
        with quiet_loading():
            model = peft.get_peft_model(model, config)
        disturb_(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / "started")
        return tmp_path / "started"

    return make


FORMS = {
    "biases of its own": {"lora_bias": True, "target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "ranks by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "groups": {"use_qalora": True},
    "magnitudes": {"use_dora": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_another_form_goes_on_and_is_put_on_as_peft_loads_it(form, base, started):
    folder = started(True, **FORMS[form])
    batch, on_top = pack(), load_policy(base, device=CPU)
    load_adapter(on_top, folder)
    policy = load_policy(replace(base, adapter_name_or_path=str(folder)), device=CPU)
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    with torch.no_grad():
        want = plain_logps(peft.PeftModel.from_pretrained(model, folder).eval(), batch)
        torch.testing.assert_close(policy.eval().logps(batch), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(on_top.eval().logps(batch), want, rtol=0, atol=1e-4)
        with policy.reference_mode():
            torch.testing.assert_close(policy.logps(batch), want, rtol=0, atol=1e-4)


STARTS = ("pissa", "pissa_niter_2", "olora", "gaussian", "orthogonal", "eva", "mica")


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_with_a_start_of_its_own_goes_on_as_peft_loads_it(start, base, started, tmp_path):
    folder = started(start)
    policy = load_policy(replace(base, adapter_name_or_path=str(folder)), device=CPU)
    check_packing(policy)
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    batch = pack()
    with torch.no_grad():
        unadapted = plain_logps(model, batch)
        with quiet_loading():
            model = peft.PeftModel.from_pretrained(model, folder).eval()
        want = plain_logps(model, batch)
        with model.disable_adapter():
            changed = not torch.allclose(plain_logps(model, batch), unadapted, rtol=0, atol=1e-3)
        assert changes_base(str(folder)) == changed
        torch.testing.assert_close(policy.eval().logps(batch), want, rtol=0, atol=1e-4)
        with policy.reference_mode():
            torch.testing.assert_close(policy.logps(batch), want, rtol=0, atol=1e-4)
    # What is trained further and saved is read by peft as it is here.
    disturb_(policy, 0.05)
    save_weights(policy, tmp_path / "again")
    other = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    with torch.no_grad(), quiet_loading():
        other = peft.PeftModel.from_pretrained(other, tmp_path / "again").eval()
        torch.testing.assert_close(policy.logps(batch), plain_logps(other, batch), rtol=0, atol=1e-4)
    assert model_digest(policy) == model_digest(
        load_policy(replace(base, adapter_name_or_path=str(folder)), device=CPU)
    )


def test_every_start_that_peft_knows_is_tried_or_refused():
    """A start that changes the base and is taken for one that does not would give a wrong reference."""
    (hint,) = [f.type for f in dataclasses.fields(peft.LoraConfig) if f.name == "init_lora_weights"]
    named = set(re.findall(r"'(\w+)[^']*'", str(hint)))
    assert {"pissa", "olora"} <= {name.removesuffix("_niter_") for name in named}
    assert named - {"loftq", "corda"} <= {"pissa_niter_", *STARTS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, r"has trained biases \(bias: all\)"),
        ({"trainable_token_indices": [3]}, r"has trained embeddings of single tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"repeats layers of its base"),
        ({"kasa_config": {"beta": 1e-4}}, r"cuts parts of its base off \(kasa_config\)"),
        ({"monteclora_config": {"num_samples": 2}}, r"draws random weights"),
        ({"alora_invocation_tokens": [3, 4]}, r"is switched on by tokens of the text .* train a plain LoRA adapter"),
        ({"init_lora_weights": "corda"}, r"init_lora_weights: corda\): save it as a plain adapter"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, r"which peft makes on a GPU"),
    ],
)
def test_adapters_that_are_more_than_their_layers_give_one_true_line(options, message, base, trained, monkeypatch):
    find = importlib.util.find_spec
    # Without it peft reads no config of LoftQ.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: find("numpy" if name == "scipy" else name, *a))
    path = trained / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(UserError, match=message):
        load_policy(replace(base, adapter_name_or_path=str(trained)), device=CPU)
    with pytest.raises(UserError, match=message):
        load_adapter(load_policy(base, device=CPU), trained)


def test_an_adapter_with_embeddings_of_added_tokens_gives_one_true_line(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    model.resize_token_embeddings(416)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "added", save_embedding_layers=True)
    with pytest.raises(UserError, match=r"added stores embed_tokens, lm_head beside its layers, as after tokens were"):
        load_policy(replace(base, adapter_name_or_path=str(tmp_path / "added")), device=CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["head", "copies"])
def test_adapters_on_the_head_and_trained_copies_go_on_beside_their_frozen_selves(kind, dtype, base, tmp_path):
    base = replace(base, dtype=dtype)
    policy = load_policy(replace(base, lora=KINDS[kind]), device=CPU)
    disturb_(policy)
    save_weights(policy, tmp_path / "trained")
    went_on = load_policy(replace(base, adapter_name_or_path=str(tmp_path / "trained")), device=CPU)
    evaluated = load_policy(replace(base, lora=LoraConfig(r=2)), device=CPU)
    load_adapter(evaluated, tmp_path / "trained")
    batch = pack()
    with torch.no_grad():
        want = policy.eval().logps(batch)
        assert torch.equal(went_on.eval().logps(batch), want)
        assert torch.equal(evaluated.eval().logps(batch), want)
        disturb_(went_on)
        assert not torch.equal(went_on.logps(batch), want)
        with went_on.reference_mode():
            assert torch.equal(went_on.logps(batch), want)
    save_weights(went_on, tmp_path / "later")
    stored = load_file(tmp_path / "later" / "adapter_model.safetensors")
    assert stored.keys() == load_file(tmp_path / "trained" / "adapter_model.safetensors").keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_the_base_of_an_adapted_head_that_peft_stores_is_read(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors").keys()
    assert any(".base_layer." in name for name in names)
    policy = load_policy(replace(base, adapter_name_or_path=str(tmp_path / "saved")), device=CPU)
    check_packing(policy)


def test_an_adapter_in_a_pickled_file_is_the_same_adapter(base, trained):
    config = replace(base, adapter_name_or_path=str(trained))
    before = model_digest(load_policy(config, device=CPU))
    torch.save(load_file(trained / "adapter_model.safetensors"), trained / "adapter_model.bin")
    (trained / "adapter_model.safetensors").unlink()
    assert is_adapter(trained)
    assert model_digest(load_policy(config, device=CPU)) == before
    load_adapter(load_policy(base, device=CPU), trained)
    (trained / "adapter_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="does not fit LlamaForCausalLM"):
        load_policy(config, device=CPU)


def test_only_the_continued_copy_is_trained_and_saved(base, trained, tmp_path):
    policy = load_policy(replace(base, adapter_name_or_path=str(trained)), device=CPU)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert names
    assert all(".default." in name for name in names)
    with policy.reference_mode():
        assert not any(p.requires_grad for p in policy.parameters())
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == names
    save_weights(policy, tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").rglob("*.safetensors")) == ["adapter_model.safetensors"]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stored_references_of_a_continued_adapter_are_its_own(base, trained, tmp_path):
    plain = model_digest(load_policy(base, device=CPU))
    fresh = model_digest(load_policy(replace(base, lora=LoraConfig(r=4)), device=CPU))
    policy = load_policy(replace(base, adapter_name_or_path=str(trained)), device=CPU)
    continued = model_digest(policy)
    disturb_(policy)
    assert model_digest(policy) == continued
    save_weights(policy, tmp_path / "later")
    later = model_digest(load_policy(replace(base, adapter_name_or_path=str(tmp_path / "later")), device=CPU))
    assert plain == fresh
    assert len({plain, continued, later}) == 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "v_prj"), r"no layer of LlamaForCausalLM is called v_prj; did you mean v_proj\?"),
        (("qkv",), r"called qkv; its layers are called act_fn, down_proj, .*v_proj"),
        ("q_porj", r"called q_porj; did you mean q_proj\?"),
        (("self_attn.q_proj", "0.mlp.up_porj"), r"called 0\.mlp\.up_porj; did you mean up_proj\?"),
    ],
)
def test_one_wrong_name_among_the_targets_is_an_error(targets, message, base):
    with pytest.raises(UserError, match=r"^model\.lora\.target_modules: .*" + message):
        load_policy(replace(base, lora=LoraConfig(target_modules=targets)), device=CPU)


def test_a_router_that_is_a_linear_layer_of_its_own_kind_is_left_alone(tmp_path):
    tiny_model(tiny_config("llama4_text")).save_pretrained(tmp_path)
    base = ModelConfig(model_name_or_path=str(tmp_path), dtype="float32")
    policy = load_policy(replace(base, lora=LoraConfig(r=4)), device=CPU)
    adapted = {
        name.partition(".lora_")[0].rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad
    }
    assert {"q_proj", "down_proj"} <= adapted
    assert "router" not in adapted
    check_packing(policy)
    with pytest.raises(
        UserError, match=r"^model\.lora\.target_modules: model\.layers\.\d\.feed_forward\.router gives more"
    ):
        load_policy(replace(base, lora=LoraConfig(r=4, target_modules=("q_proj", "router"))), device=CPU)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "fc1"), ("q_proj",), "q_proj", r".*\.q_proj"])
def test_of_a_composite_the_text_model_alone_is_adapted(targets, tmp_path):
    model = tiny_model(tiny_config("gemma3"))
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    model.save_pretrained(tmp_path / "base")
    base = ModelConfig(model_name_or_path=str(tmp_path / "base"), dtype="float32")
    lora = replace(base, lora=LoraConfig(r=4, target_modules=targets))
    if targets == ("q_proj", "fc1"):
        with pytest.raises(UserError, match="no layer of Gemma3ForConditionalGeneration is called fc1"):
            load_policy(lora, device=CPU)
        return
    policy = load_policy(lora, device=CPU)
    adapted = [name for name, p in policy.causal_lm.named_parameters() if p.requires_grad]
    assert adapted
    assert all(name.startswith("model.language_model.layers.") for name in adapted)
    disturb_(policy)
    save_weights(policy, tmp_path / "saved")
    again = load_policy(replace(base, adapter_name_or_path=str(tmp_path / "saved")), device=CPU)
    with torch.no_grad():
        assert torch.equal(again.eval().logps(pack(100)), policy.eval().logps(pack(100)))


def test_adapters_that_cannot_go_on_are_named(base, trained, tmp_path):
    def load(path: Path) -> None:
        load_policy(replace(base, adapter_name_or_path=str(path)), device=CPU)

    with pytest.raises(UserError, match=r"model\.adapter_name_or_path=.*nowhere is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.adapter_name_or_path=.*empty does not fit LlamaForCausalLM"):
        load(tmp_path / "empty")
    settings = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match="it belongs to other layers"):
        load(trained)
    (trained / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LOHA"}))
    with pytest.raises(UserError, match="only LORA is supported"):
        load(trained)
