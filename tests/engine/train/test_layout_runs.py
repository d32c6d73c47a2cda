"""Whole runs of a hybrid model, whose mixers get rows, and of a model that runs in rows: what packs promise holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen3_5 import modeling_qwen3_5

from engine.config.schema import RunConfig
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.train.loop import train
from tests.engine.distributed.launch import run_jobs
from tests.engine.model.kernel_stand_ins import NO_GRADIENTS, install_all
from tests.engine.train.conftest import assert_same_trajectory, read_rows, save_family
from tests.engine.train.test_resume import assert_resumes_exactly

FAMILIES = {"lfm2": "mixers", "bloom": "rows"}
INSIDE = {"lfm2": ".conv.", "bloom": ".self_attention."}
"""Part of the names of what only rows make right."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def model_dir(request, tmp_path_factory, tiny_tokenizer) -> Path:
    """The folder of a tiny model of a family, after which it is named."""
    return save_family(request.param, tmp_path_factory.mktemp("models") / request.param, tiny_tokenizer)


def test_a_run_says_its_layout_and_does_not_depend_on_packs(model_dir, make_config, rows_of, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = []
    for budget, share, layout in ((400, True, "auto"), (1200, False, "auto"), (1200, True, "rows")):
        config = make_config(
            model={"model_name_or_path": str(model_dir)},
            packing={"tokens_per_pack": budget, "share_prompts": share, "layout": layout},
            train={"output_dir": str(tmp_path / f"{budget}{share}{layout}"), "max_steps": 2},
        )
        train(config)
        rows.append(rows_of(config))
        found = json.loads((Path(config.train.output_dir) / "data.json").read_text())["layout"]
        assert found["kind"] == (FAMILIES[model_dir.name] if layout == "auto" else "rows")
    assert rows[0][0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert_same_trajectory(rows[0], rows[1], 1e-4)
    assert_same_trajectory(rows[0], rows[2], 1e-4)
    in_rows = [row["perf/padding_fraction"] > 0 for row in rows[0]]
    assert all(in_rows) if FAMILIES[model_dir.name] == "rows" else not any(in_rows)
    shares = [[row.get("perf/mixer_padding") for row in run] for run in rows]
    mixers = FAMILIES[model_dir.name] == "mixers"
    assert all((share is not None and 0 < share < 0.5) == mixers for share in shares[0] + shares[1])
    assert set(shares[2]) == {None}
    told = [line.startswith("mixer padding") for line in caplog.text.splitlines()]
    assert sum(told) == (2 if mixers else 0)


def test_rows_end_to_end_train_as_padded_ones(make_config, rows_of, tmp_path, tiny_tokenizer, monkeypatch):
    model_dir = save_family("qwen3_5_text", tmp_path / "model", tiny_tokenizer)
    rows = []
    for kernels in (False, True):
        if kernels:
            install_all(monkeypatch, modeling_qwen3_5)
        config = make_config(
            model={"model_name_or_path": str(model_dir)},
            train={"output_dir": str(tmp_path / str(kernels)), "max_steps": 2},
        )
        train(config)
        rows.append(rows_of(config))
        data = json.loads((Path(config.train.output_dir) / "data.json").read_text())
        assert data["layout"]["joined"] == kernels
        assert all((row["perf/mixer_padding"] == 0) == kernels for row in rows[-1])
        assert (data["plan"]["mixer_cells"] == data["plan"]["unshared_tokens"]) == kernels
    assert_same_trajectory(rows[0], rows[1], 1e-4)


def test_kernels_without_gradients_end_a_run_before_it_begins(make_config, tmp_path, tiny_tokenizer, monkeypatch):
    model_dir = save_family("qwen3_5_text", tmp_path / "model", tiny_tokenizer)
    install_all(monkeypatch, modeling_qwen3_5, NO_GRADIENTS)
    store = tmp_path / "store"
    config = make_config(model={"model_name_or_path": str(model_dir)}, reference={"store": str(store)})
    with pytest.raises(UserError, match="the backward pass of Qwen3_5GatedDeltaNet raises RuntimeError: Triton"):
        train(config)
    assert not store.exists()


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.3}])
def test_a_run_resumes_to_the_same_bits(lora, model_dir, make_config, tmp_path, monkeypatch):
    model = {"model_name_or_path": str(model_dir), "lora": lora}

    def make(**sections) -> RunConfig:
        return make_config(**{**sections, "train": {**sections["train"], "gradient_checkpointing": lora is not None}})

    assert_resumes_exactly(make, tmp_path, monkeypatch, model=model)
    if lora is not None:
        trained = load_file(tmp_path / "whole" / "adapter_model.safetensors")
        inside = [weight for name, weight in trained.items() if INSIDE[model_dir.name] in name and "lora_B" in name]
        assert inside
        assert all(weight.abs().max() > 0 for weight in inside)


def test_what_was_trained_is_evaluated(model_dir, make_config, pairs_jsonl):
    config = make_config(
        model={"model_name_or_path": str(model_dir)},
        data={"eval_dataset_name": str(pairs_jsonl), "eval_dataset_split": "train"},
        train={"max_steps": 2},
    )
    train(config)
    written = json.loads((Path(config.train.output_dir) / "evaluation.json").read_text())
    values = evaluate(config, config.train.output_dir)
    for name in ("eval_loss", "eval_logps/chosen", "eval_ranking_accuracy"):
        assert values[name] == pytest.approx(written[name], rel=1e-5)


def test_two_processes_train_as_one(model_dir, make_config, rows_of, tmp_path):
    alone, together = (
        make_config(
            model={"model_name_or_path": str(model_dir)},
            train={"max_steps": 2, "gradient_checkpointing": True, "output_dir": str(tmp_path / name)},
        )
        for name in ("alone", "together")
    )
    train(alone)
    ended = run_jobs(tmp_path, 2, [{"kind": "train", "config": asdict(together), "resume": False}])
    assert all(process.code == 0 for process in ended), ended[0].err
    theirs = [row for row in read_rows(together.train.output_dir) if "loss" in row]
    assert_same_trajectory(theirs, rows_of(alone), 1e-4)
    one, two = (load_file(Path(c.train.output_dir) / "model.safetensors") for c in (alone, together))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-3 * weight.abs().max().item())
