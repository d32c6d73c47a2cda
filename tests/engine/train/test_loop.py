"""A whole run: what it logs, writes and learns, however it is computed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kernels import describe
from engine.model import choose_backend
from engine.train.loop import train
from tests.engine.train.conftest import assert_same_trajectory


@pytest.fixture(scope="module")
def eval_jsonl(tmp_path_factory, pairs_jsonl):
    path = tmp_path_factory.mktemp("eval") / "eval.jsonl"
    path.write_text("".join(pairs_jsonl.read_text().splitlines(keepends=True)[:8]))
    return path


def test_a_run_learns_and_leaves_what_it_promises(make_config, rows_of, eval_jsonl, tmp_path, caplog):
    config = make_config(
        data={"eval_dataset_name": str(eval_jsonl)},
        train={"num_train_epochs": 5, "eval_steps": 8, "report_to": ["tensorboard"]},
    )
    with caplog.at_level("INFO"):
        result = train(config)
    run = tmp_path / "run"
    rows = rows_of(config)
    assert [r["step"] for r in rows] == list(range(1, 21))
    assert result.steps == 20
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert [rows[i]["epoch"] for i in (0, -1)] == [0.25, 5.0]
    assert [rows[i]["learning_rate"] for i in (0, 10)] == pytest.approx([2e-3, 1e-3])
    evaluations = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" in x]
    assert [e["step"] for e in evaluations] == [8, 16, 20]
    assert evaluations[-1]["eval_loss"] < 0.3
    assert evaluations[-1]["eval_rewards/accuracies"] == 1.0
    assert result.metrics["eval_loss"] == evaluations[-1]["eval_loss"]
    assert json.loads((run / "evaluation.json").read_text())["eval_num_pairs"] == 8
    assert list((run / "tensorboard").iterdir())
    data = json.loads((run / "data.json").read_text())
    assert {len(v) for v in data["lengths"].values()} == {24}
    assert (data["lint"]["kept"], data["plan"]["total_steps"]) == (24, 20)
    backend = choose_backend("auto", torch.device("cpu"), torch.float32).name
    head = f"linear_dpo_loss: {describe('cpu').linear_dpo_loss.impl}"
    for words in ("attention", backend, head, "24 of 24 rows", "sigmoid loss 0.693", "step 20/20"):
        assert words in caplog.text


def test_the_final_model_loads_elsewhere(make_config, tiny_model_dir, tmp_path):
    config = make_config()
    train(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert all(moved)
    ids = tokenizer("Where does the river go?", return_tensors="pt")
    assert model(**ids).logits.isfinite().all()
    card = (tmp_path / "run" / "README.md").read_text()
    for words in (
        "---\nlibrary_name: transformers",
        str(tiny_model_dir),
        "loss `sigmoid`",
        "pairs_per_step: 6",
        "torch 2.",
    ):
        assert words in card


def test_bfloat16_trains_and_is_stored_as_asked(make_config, rows_of, tmp_path):
    train_options = {"num_train_epochs": 2, "save_steps": 4, "save_dtype": "bfloat16"}
    config = make_config(model={"dtype": "bfloat16"}, train=train_options)
    train(config)
    rows = rows_of(config)
    assert rows[-1]["loss"] < rows[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.bfloat16
    final = load_file(tmp_path / "run" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert all(torch.equal(final[name], t.bfloat16()) for name, t in saved.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": {"tokens_per_pack": 100_000}},
        {"packing": {"tokens_per_pack": 220}},
        {"packing": {"share_prompts": False}},
        {"train": {"gradient_checkpointing": True}},
        {"train": {"gradient_checkpointing": "selective"}},
        {"reference": {"mode": "live"}},
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_change_what_is_learned(changes, make_config, rows_of, tmp_path):
    first = make_config(train={"output_dir": str(tmp_path / "first")})
    train(first)
    second = make_config(**changes)
    train(second)
    assert_same_trajectory(rows_of(second), rows_of(first))


def test_rmsprop_and_a_schedule_of_the_evaluation_loss(make_config, rows_of, eval_jsonl):
    config = make_config(
        data={"eval_dataset_name": str(eval_jsonl)},
        optim={
            "optimizer": "rmsprop",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 100.0},
        },
        train={"eval_steps": 1},
    )
    train(config)
    assert [r["learning_rate"] for r in rows_of(config)] == pytest.approx([1e-4, 5e-5, 2.5e-5, 1.25e-5])


def test_logging_interval_averages_and_the_last_step_is_logged(make_config, rows_of, tmp_path):
    every = make_config(train={"output_dir": str(tmp_path / "every"), "max_steps": 5})
    third = make_config(train={"logging_steps": 3, "max_steps": 5})
    train(every)
    train(third)
    single, averaged = rows_of(every), rows_of(third)
    assert [r["step"] for r in averaged] == [3, 5]
    for row, members in zip(averaged, (single[:3], single[3:]), strict=True):
        for name in ("loss", "rewards/margins", "logps/rejected"):
            assert row[name] == pytest.approx(sum(m[name] for m in members) / len(members), rel=1e-9)
        for name in ("grad_norm", "learning_rate", "num_tokens", "epoch"):
            assert row[name] == members[-1][name]


def test_clipping_is_logged_before_it_is_applied(make_config, rows_of, tmp_path):
    runs = {}
    for limit in (0.0, 1e-3, 1e6):
        config = make_config(
            optim={"max_grad_norm": limit, "optimizer": "rmsprop", "learning_rate": 1e-4},
            train={"output_dir": str(tmp_path / str(limit))},
        )
        train(config)
        runs[limit] = rows_of(config)
    assert_same_trajectory(runs[0.0], runs[1e6])
    assert runs[1e-3][0]["grad_norm"] == runs[0.0][0]["grad_norm"] > 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_on_cuda_follows_the_cpu(dtype, make_config, rows_of, monkeypatch, tmp_path):
    runs = {}
    for device in ("cuda", "cpu"):
        name = "engine.train.setup.resolve_device"
        monkeypatch.setattr(name, lambda device=device: torch.device(device, *([0] if device == "cuda" else [])))
        config = make_config(
            model={"dtype": dtype},
            reference={"store": str(tmp_path / "store")},
            train={"output_dir": str(tmp_path / device), "logging_steps": 2},
        )
        train(config)
        runs[device] = [row["loss"] for row in rows_of(config)]
    assert runs["cuda"] == pytest.approx(runs["cpu"], abs=2e-3 if dtype == "float32" else 5e-2)
