from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.model.policy import Layout
from engine.reference import dataset_keys, keys, model_digest, response_key

DIGEST = "0123456789abcdef" * 2


def ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


class Scored:
    """A transformers model with what a policy adds to it."""

    def __init__(self, model, dtype=torch.float32, backend: str = "sdpa", reference_adapter: str | None = None):
        self.model = model
        self.compute_dtype = dtype
        self.device = torch.device("cpu")
        self.reference_adapter = reference_adapter
        self.backend = type("Backend", (), {"name": backend})
        self.layout = Layout()

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def causal_lm(self):
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def config(self):
        return self.causal_lm.config


def llama(*, tied: bool = False, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **(sizes | changes)))


def test_a_key_is_stable_across_releases():
    """A change of this value makes every user's store useless: it needs a line in the changelog."""
    assert response_key(DIGEST, ids(1, 2, 3), ids(4, 5)).hex() == "012345673257c8aa108453e61f215e3d"


def test_a_key_depends_on_model_tokens_and_boundary_alone():
    base = response_key(DIGEST, ids(1, 2, 3), ids(4, 5))
    assert len(base) == 16
    assert base == response_key(DIGEST, np.asarray([1, 2, 3], np.int64), np.asarray([4, 5], np.int64))
    others = [
        response_key("f" * 32, ids(1, 2, 3), ids(4, 5)),
        response_key(DIGEST, ids(1, 2), ids(3, 4, 5)),
        response_key(DIGEST, ids(1, 2, 3, 4), ids(5)),
        response_key(DIGEST, ids(1, 2, 3), ids(4, 6)),
        response_key(DIGEST, ids(1, 2, 3), ids(4, 5, 0)),
        response_key(DIGEST, ids(0, 2, 3), ids(4, 5)),
    ]
    assert len({base, *others}) == 7


def test_dataset_keys_are_the_keys_of_the_single_responses(dataset):
    found = dataset_keys(dataset, DIGEST)
    assert found == [tuple(response_key(DIGEST, g.prompt_ids, r) for r in g.response_ids) for g in dataset]


def test_dataset_keys_ignore_rows_and_columns():
    group = PreferenceGroup(0, ids(1), (ids(2), ids(3)))
    moved = PreferenceGroup(9, ids(1), (ids(2), ids(3)), ref_logps=(-1.0, -2.0))
    assert dataset_keys(PreferenceDataset([group]), DIGEST) == dataset_keys(PreferenceDataset([moved]), DIGEST)


def test_the_digest_follows_weights_config_dtype_and_attention():
    base = model_digest(Scored(llama()))
    assert len(bytes.fromhex(base)) == 16
    assert base == model_digest(Scored(llama()))
    changed = llama()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    others = [
        model_digest(Scored(changed)),
        model_digest(Scored(llama(), dtype=torch.bfloat16)),
        model_digest(Scored(llama(), backend="flash")),
        model_digest(Scored(llama().bfloat16())),
        model_digest(Scored(llama(rms_norm_eps=1e-5))),
        model_digest(Scored(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))),
    ]
    assert len({base, *others}) == 7


def test_the_digest_follows_what_computes_and_nothing_finer(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "flash-attn": "2.8.3"}
    monkeypatch.setattr(keys.metadata, "version", versions.__getitem__)
    scored = Scored(llama(), backend="flash")
    base = keys.identify(scored)
    versions |= {"torch": "2.13.1+cu130", "transformers": "5.23.4", "flash-attn": "2.8.3.post1", "numpy": "3"}
    assert keys.identify(scored) == base
    found = {base.digest}
    for package, version in (("torch", "2.14.0"), ("transformers", "5.24.0"), ("flash-attn", "2.9.0")):
        with monkeypatch.context() as context:
            context.setitem(versions, package, version)
            found.add(keys.identify(scored).digest)
    with monkeypatch.context() as context:
        context.setattr(keys, "choose", lambda op, impl, device, dtype: type("Choice", (), {"impl": "triton"}))
        found.add(keys.identify(scored).digest)
    with monkeypatch.context() as context:
        context.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        found.add(keys.identify(scored).digest)
    with monkeypatch.context() as context:
        context.setattr(scored, "device", torch.device("cuda", 1))
        found.add(keys.identify(scored).digest)
        context.setattr(scored, "device", torch.device("cuda", 0))
        found.add(keys.identify(scored).digest)
    assert len(found) == 7


def test_the_digest_survives_saving_loading_and_harmless_config(tmp_path):
    model = llama()
    base = model_digest(Scored(model))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"transformers_version": "5.99.0", "use_cache": False, "pad_token_id": 0, "eos_token_id": [2, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model_digest(Scored(loaded)) == base


def test_processes_share_the_reading(monkeypatch):
    tensors = [torch.full((3,), float(i)) for i in range(5)]
    whole = keys._digests(tensors)
    shares = []

    def gather(found):
        shares.append(sorted(found))
        return [dict(enumerate(whole))]

    monkeypatch.setattr(keys.distributed, "size", lambda: 2)
    monkeypatch.setattr(keys.distributed, "gather", gather)
    for rank in (0, 1):
        monkeypatch.setattr(keys.distributed, "rank", lambda rank=rank: rank)
        assert keys._digests(tensors) == whole
    assert shares == [[0, 2, 4], [1, 3]]


def test_tied_weights_are_read_once(monkeypatch):
    real, read = keys._tensor_digest, []

    def spy(tensor):
        read.append(tensor.data_ptr())
        return real(tensor)

    monkeypatch.setattr(keys, "_tensor_digest", spy)
    model = llama(tied=True)
    model_digest(Scored(model))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(read) == len(set(read)) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_chunks_and_strides_do_not_change_a_tensors_digest(monkeypatch, dtype):
    tensor = torch.arange(3000).reshape(50, 60).to(dtype)
    whole = keys._tensor_digest(tensor)
    monkeypatch.setattr(keys, "_CHUNK_BYTES", 128)
    assert keys._tensor_digest(tensor) == whole
    assert keys._tensor_digest(tensor.t().contiguous().t()) == whole
    assert keys._tensor_digest(tensor[0, 0]) == keys._tensor_digest(tensor[0, :1])


def test_trained_adapters_are_left_out_and_frozen_ones_count():
    peft = pytest.importorskip("peft")
    plain = model_digest(Scored(llama()))

    def adapted(**options):
        return peft.get_peft_model(llama(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))

    for options in ({"target_modules": "all-linear"}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}):
        model = adapted(**options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 1
        assert model_digest(Scored(model)) == plain

    model = adapted(target_modules=["q_proj"])
    torch.manual_seed(1)
    model.add_adapter("frozen", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with_frozen = model_digest(Scored(model, reference_adapter="frozen"))
    assert model_digest(Scored(model)) == plain
    assert with_frozen != plain
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B")["frozen"].weight += 1
    moved = model_digest(Scored(model, reference_adapter="frozen"))
    model.peft_config["frozen"].lora_alpha = 99
    assert len({with_frozen, moved, model_digest(Scored(model, reference_adapter="frozen"))}) == 3
