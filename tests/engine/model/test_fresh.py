"""A reference with an adapter is what transformers and peft alone make of the same files, or the run does not start."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.data import load_dataset_groups
from engine.errors import UserError
from engine.model import adapters, fresh, load_tokenizer
from engine.model.fresh import score_fresh
from engine.train.loop import train
from engine.train.setup import prepare
from tests.engine.train.conftest import default_config, read_rows

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    """A trained PiSSA adapter."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def make_config(tiny_model_dir, pairs_jsonl, tmp_path):
    return lambda **sections: default_config(tmp_path, tiny_model_dir, pairs_jsonl, tmp_path / "store", **sections)


def first_metrics(config) -> dict:
    train(config)
    return read_rows(config.train.output_dir)[0]


def first_row_by_peft(config, base, adapter) -> list[float]:
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="train")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    sums = []
    with torch.no_grad():
        for response in dataset[0].response_ids:
            ids = torch.tensor([*dataset[0].prompt_ids.tolist(), *response.tolist()])
            logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            start = len(dataset[0].prompt_ids)
            sums.append(logps[start - 1 : -1].gather(1, ids[start:, None]).sum().item())
    return sums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_from_an_adapter_that_took_a_part_out_of_its_base(dtype, adapter, make_config, tiny_model_dir):
    config = make_config(model={"adapter_name_or_path": adapter, "dtype": dtype})
    found = prepare(config).references.tables["train"].lookup((0,))
    tolerance = {"float32": 1e-3, "bfloat16": 1.0}[dtype]
    assert found == pytest.approx(first_row_by_peft(config, tiny_model_dir, adapter), abs=tolerance)


def test_in_bfloat16_a_plain_load_is_scored_in_float32(adapter, make_config, monkeypatch):
    scores, announced = [], []
    monkeypatch.setattr("engine.distributed.announce", announced.append)
    for dtype in ("float32", "bfloat16"):
        config = make_config(model={"adapter_name_or_path": adapter, "dtype": dtype})
        dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="train")
        scores.append(score_fresh(config.model, dataset, CPU))
    assert not scores[0].errors_S.any()
    assert (scores[1].errors_S > 0).any()
    # Others wait for it.
    assert announced == ["scores rows with a plain load of the adapter"] * 2
    # The weights are rounded, the sums are not.
    assert scores[1].sums_S == pytest.approx(scores[0].sums_S, abs=1.0)


@pytest.mark.parametrize("place", ["model.adapter_name_or_path", "reference.model_name_or_path"])
@pytest.mark.parametrize("mode", ["auto", "live"])
def test_a_copy_that_takes_a_part_out_of_the_base_again_stops_the_run(mode, place, adapter, make_config, monkeypatch):
    """What is loaded so agrees with itself in every other check."""

    def add_again(peft, model, *, filled):
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        model.add_adapter("reference", config)
        weights = peft.get_peft_model_state_dict(model, adapter_name="default")
        peft.set_peft_model_state_dict(model, weights, adapter_name="reference")

    monkeypatch.setattr(adapters, "_add_frozen_copy", add_again)
    section, key = place.split(".")
    sections = {"reference": {"mode": mode}}
    sections.setdefault(section, {})[key] = adapter
    config = make_config(**sections)
    with pytest.raises(UserError, match=r"start-up check: the model gives a response of row \d+ the log-prob -\d"):
        prepare(config)


def test_a_plain_load_that_fails_is_said_unless_ours_fails_too(adapter, make_config, monkeypatch):
    config = make_config(model={"adapter_name_or_path": adapter})

    def fail(*args):
        raise ValueError("it is not to be")

    monkeypatch.setattr("engine.model.fresh._load", fail)
    with pytest.raises(UserError, match=r"^start-up check: transformers and peft alone .*: it is not to be"):
        prepare(config)
    (Path(adapter) / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^model\.adapter_name_or_path=.* does not fit LlamaForCausalLM"):
        prepare(config)


def test_without_an_adapter_nothing_is_loaded_twice(make_config):
    config = make_config(model={"lora": {"r": 4}})
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="train")
    assert score_fresh(config.model, dataset, CPU) is None


def test_a_plain_load_is_gone_before_the_model_is_loaded(adapter, make_config, monkeypatch):
    plain, load = [], fresh._load

    def remembered(*args):
        loaded = load(*args)
        plain.append(weakref.ref(loaded))
        return loaded

    def begin(*args, **options):
        raise UserError(f"in memory: {[found() for found in plain]}")

    monkeypatch.setattr(fresh, "_load", remembered)
    monkeypatch.setattr("engine.model.ready.load_policy", begin)
    with pytest.raises(UserError, match=r"^in memory: \[None\]$"):
        prepare(make_config(model={"adapter_name_or_path": adapter}))


@pytest.mark.parametrize("mode", ["auto", "live"])
def test_an_adapter_is_a_reference_on_the_base_that_it_names(mode, adapter, make_config, tiny_model_dir):
    config = make_config(reference={"model_name_or_path": adapter, "mode": mode}, train={"max_steps": 1})
    ours = first_metrics(config)
    assert np.isfinite(ours["loss"])
    # A full model that is the same function.
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter)
    folder = adapter + "-merged"
    merged.merge_and_unload().save_pretrained(folder)
    other = make_config(
        reference={"model_name_or_path": folder, "mode": mode}, train={"max_steps": 1, "output_dir": folder + "-run"}
    )
    theirs = first_metrics(other)
    for name in ("loss", "rewards/chosen", "rewards/rejected"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


def test_a_reference_that_does_not_load_is_named_by_its_own_key(adapter, make_config, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace("tiny-llama", "gone"))
    config = make_config(reference={"model_name_or_path": adapter})
    with pytest.raises(UserError, match=rf"^reference\.model_name_or_path={adapter}: .*gone"):
        prepare(config)
    config = make_config(reference={"model_name_or_path": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"^reference\.model_name_or_path=.*nowhere is not a folder"):
        prepare(config)
