"""A much reduced demo, end to end."""

from __future__ import annotations

import json

import pytest
import torch

from engine import cli
from engine.config import load_config
from engine.demo import DemoSize, ModelSize, run_demo
from engine.errors import UserError

SMALL = DemoSize(
    dialogues=600,
    model=ModelSize(hidden=64, layers=1, heads=2, kv_heads=2, mlp=64, steps=60, batch=16),
    pairs=96,
    held_out=24,
    pairs_per_step=16,
    learning_rate=5e-4,
    warmup_steps=1,
    eval_steps=3,
    samples=4,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    threads = torch.get_num_threads()
    return folder, run_demo(folder, cli.run, size=SMALL), threads == torch.get_num_threads()


def test_the_preference_is_learned(finished):
    _, result, threads_kept = finished
    assert result.before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result.before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert result.after["eval_rewards/accuracies"] >= 0.9
    assert result.after["eval_rewards/margins"] > 0.1
    key = "eval_ranking_accuracy_per_token"
    assert result.after[key] > result.before[key]
    assert result.after["eval_num_pairs"] == 24
    assert threads_kept


def test_everything_is_where_it_is_said_to_be(finished):
    folder, result, _ = finished
    assert result.report.is_file()
    assert (result.report.parent / "loss.png").stat().st_size > 10_000
    assert json.loads((result.model / "evaluation.json").read_text()) == result.after
    assert load_config(folder / "run.yaml").train.output_dir == str(result.model)
    assert len((folder / "data" / "train.jsonl").read_text().splitlines()) == 96
    assert [len(sample) for sample in result.samples] == [3] * 4
    assert set(result.seconds) >= {"starting model", "check", "plan", "precompute", "train", "report"}


def test_stored_references_are_used_and_no_cache_is_touched(finished):
    folder, _, _ = finished
    assert any((folder / "references").rglob("*.parquet"))


def test_nothing_is_started_in_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="did not write"):
        run_demo(tmp_path, cli.run, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
