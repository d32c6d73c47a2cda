"""Twenty optimizer steps beside TRL: the same losses, gradient norms and rewards, however the data is packed.

A value is compared within 1e-4 of the largest magnitude that its metric takes in TRL's trajectory: log-prob sums of
hundreds of nats in float32 leave no more digits for a single small reward.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.trl_peer import TrlRun, hh_pairs, train_with_trl
from engine.config import load_config
from engine.train.loop import train

pytest.importorskip("trl")

STEPS = 20
PAIRS = 4
LEARNING_RATE = 3e-4
MAX_LENGTH = 192
TOKEN_METRICS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
METRICS = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins")
RELATIVE = 1e-4

PACKINGS = {
    "one pack": {"tokens_per_pack": 100_000, "share_prompts": True},
    "small packs": {"tokens_per_pack": 500, "share_prompts": True},
    "no sharing": {"tokens_per_pack": 1000, "share_prompts": False},
}


@pytest.fixture(scope="module")
def model_dir(shared_dir: Path) -> Path:
    return shared_dir / "models" / "tiny-chat-llama"


@pytest.fixture(scope="module")
def data_file(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with gzip.open(shared_dir / "data" / "hh-harmless-test.jsonl.gz", "rt") as lines:
        rows = hh_pairs([json.loads(line) for line in lines])
    # Prompts that leave room for an answer, so that every row is kept and truncation takes part.
    rows = [row for row in rows if len(row["prompt"]) < 500][: STEPS * PAIRS]
    path = tmp_path_factory.mktemp("hh") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trl_run(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrlRun:
    return train_with_trl(
        model_dir,
        data_file,
        tmp_path_factory.mktemp("trl"),
        pairs_per_step=PAIRS,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
    )


def write_config(path: Path, model_dir: Path, data_file: Path, output_dir: Path, packing: dict) -> Path:
    """The engine's counterpart of the TRL run."""
    config = {
        "model": {"model_name_or_path": str(model_dir), "dtype": "float32"},
        "data": {"dataset_name": str(data_file), "max_length": MAX_LENGTH},
        "packing": {"pairs_per_step": PAIRS, "shuffle": False, **packing},
        "optim": {"learning_rate": LEARNING_RATE},
        "reference": {"store": str(path.parent / "store")},
        "train": {"output_dir": str(output_dir), "max_steps": STEPS, "logging_steps": 1},
    }
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("packing", PACKINGS)
def test_twenty_steps_equal_trl(packing, trl_run, model_dir, data_file, tmp_path):
    output_dir = tmp_path / "run"
    train(load_config(write_config(tmp_path / "run.yaml", model_dir, data_file, output_dir, PACKINGS[packing])))
    ours = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    theirs = trl_run.log_history
    assert len(ours) == len(theirs) == STEPS
    speeds = {name for name in theirs[0] if name.startswith("train_")}
    assert set(theirs[0]) - speeds <= set(ours[0])
    for name in METRICS + TOKEN_METRICS:
        got, want = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for rows in (ours, theirs))
        worst = ((got - want).abs().max() / want.abs().max()).item()
        assert worst <= RELATIVE, f"{name}: {worst:.2e} relative to its largest value"
    assert [row["rewards/accuracies"] for row in ours] == [row["rewards/accuracies"] for row in theirs]
    assert [row["num_tokens"] for row in ours] == [row["num_tokens"] for row in theirs]
    weights = load_file(output_dir / "model.safetensors")
    for name, want in trl_run.final_weights.items():
        if name in weights:
            torch.testing.assert_close(weights[name].float(), want, atol=2e-4, rtol=0)
