"""The layout that ``dpo plan`` counts is the one that a run takes, and a line says how it was found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.qwen3_5 import modeling_qwen3_5

from engine.data import load_dataset_groups
from engine.forecast import describe_forecast, shallow
from engine.forecast import layout as module
from engine.forecast.layout import find_layout
from engine.model import check_packing, load_policy
from tests.engine.model.kernel_stand_ins import install_all
from tests.engine.train.conftest import save_family

CPU = torch.device("cpu")
RANDOM = "with random weights"


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        ("llama", "packs", f"by the start-up check, on 1 of 4 layers {RANDOM}"),
        ("lfm2", "mixers in rows", f"Lfm2ShortConv x 2, by the start-up check, on 2 of 4 layers {RANDOM}"),
        ("mamba2", "mixers in rows", f"Mamba2Mixer x 4, by the start-up check, on 1 of 4 layers {RANDOM}"),
        ("bloom", "rows", f"by the start-up check, on 1 of 4 layers {RANDOM}"),
    ],
)
def test_it_is_the_layout_of_the_run(family, name, words, config, tmp_path, tiny_tokenizer):
    folder = save_family(family, tmp_path / family, tiny_tokenizer)
    config = replace(config, model=replace(config.model, model_name_or_path=str(folder)))
    found = find_layout(config, CPU)
    assert (found.name, found.source) == (name, words)
    policy = load_policy(config.model, device=CPU)
    check_packing(policy)
    assert found.layout._replace(reason="", padded_for="") == policy.layout._replace(reason="", padded_for="")
    if Version(transformers.__version__) >= Version("5.23"):
        assert found.layout.padded_for == policy.layout.padded_for
    else:
        # Earlier ones leave the boundaries aside without a word: what the check then finds depends on the weights.
        assert bool(found.layout.padded_for) == bool(policy.layout.padded_for)
    assert (found.packing.layout == "rows") == (name == "rows")
    assert found.packing.share_prompts == (name != "rows")


def test_a_model_whose_kernels_take_no_shapes_alone(config, tmp_path, tiny_tokenizer, monkeypatch):
    """Its layout and time are known all the same."""
    folder = save_family("qwen3_5_text", tmp_path / "model", tiny_tokenizer)
    install_all(monkeypatch, modeling_qwen3_5)
    config = replace(config, model=replace(config.model, model_name_or_path=str(folder)))
    dataset = load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]
    monkeypatch.setattr("engine.forecast.duration.measure_matmul_rate", lambda device, dtype: 1e9)
    lines = {line.split("  ")[0]: line for line in describe_forecast(dataset, config).splitlines()}
    assert "Qwen3_5GatedDeltaNet x 2, end to end, by the start-up check, on 2 of 4 layers" in lines["layout"]
    assert " 0.0% " in lines["mixer padding"]
    assert "unknown" in lines["peak memory"]
    assert " FLOP at " in lines["time"]


def test_what_is_not_found_is_assumed_and_said(config, monkeypatch):
    later = "; `dpo train` takes the first layout that its start-up check finds exact"
    monkeypatch.setattr(shallow, "free_bytes", lambda device: 2**10)
    found = find_layout(config, CPU)
    assert found.layout.kind == "shared"
    assert found.source.startswith("assumed: layers of every kind would take 0.0 of 0.0 GiB")
    assert found.source.endswith(later)
    rows = replace(config, packing=replace(config.packing, layout="rows"))
    assert find_layout(rows, CPU).layout.kind == "rows"
    assert not find_layout(rows, CPU).packing.share_prompts
    monkeypatch.undo()

    def refuse(*args, **kwargs):
        raise module.UserError("it is not causal")

    monkeypatch.setattr(module, "check_packing", refuse)
    assert find_layout(config, CPU).source == f"assumed: {RANDOM} it is not causal{later}"
