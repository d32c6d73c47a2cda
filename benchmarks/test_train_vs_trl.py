"""End-to-end training and reference precompute beside TRL 1.16, in one run on two CPU threads.

Both train the same model from the same folder in float32, one epoch over the same 128 pairs in source order, batches of
8 pairs, max_length 1024, AdamW, precomputed references, one log row per step with everything that they log. Ours runs
before and after TRL; medians are reported. Times are of the precompute pass and of the training loop, without loading,
tokenising and the start-up checks.
"""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.end_to_end import PAIRS, benchmark_rows, save_model
from benchmarks.results import write_result
from benchmarks.trl_peer import train_with_trl
from engine.config import load_config
from engine.data import load_dataset_groups
from engine.model import load_policy, load_tokenizer
from engine.reference import ReferenceStore, precompute
from engine.train.loop import train

trl = pytest.importorskip("trl")

PAIRS_PER_STEP = 8
ROUNDS = 3


@dataclass(frozen=True)
class Rates:
    """Pairs per second, and the last loss to show that both did the same work."""

    precompute: float
    train: float
    last_loss: float


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[str, Path, Path]:
    """Name of the data, model folder, data file."""
    folder = tmp_path_factory.mktemp("job")
    name, rows, texts = benchmark_rows()
    save_model(folder / "model", texts)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name, folder / "model", folder / "pairs.jsonl"


def run_ours(model_dir: Path, data_file: Path, folder: Path) -> Rates:
    folder.mkdir()
    (folder / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"model_name_or_path": str(model_dir), "dtype": "float32"},
                "data": {"dataset_name": str(data_file)},
                "packing": {"pairs_per_step": PAIRS_PER_STEP, "shuffle": False},
                "reference": {"store": str(folder / "store")},
                "train": {"output_dir": str(folder / "run"), "logging_steps": 1, "save_steps": None},
            }
        )
    )
    config = load_config(folder / "run.yaml")
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="train")
    policy = load_policy(config.model, device=torch.device("cpu"))
    report = precompute(
        policy,
        dataset,
        ReferenceStore(folder / "store"),
        tokens_per_pack=config.packing.tokens_per_pack,
        progress=False,
    )
    train(config)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(PAIRS_PER_STEP / row["perf/pairs_per_second"] for row in rows)
    return Rates(report.rows_per_second, PAIRS / seconds, rows[-1]["loss"])


def run_trl(model_dir: Path, data_file: Path, folder: Path) -> Rates:
    folder.mkdir()
    run = train_with_trl(model_dir, data_file, folder, pairs_per_step=PAIRS_PER_STEP)
    return Rates(PAIRS / run.precompute_seconds, PAIRS / run.train_seconds, run.log_history[-1]["loss"])


def test_train_vs_trl(benchmark, job, tmp_path):
    name, model_dir, data_file = job
    torch.set_num_threads(2)
    ours: list[Rates] = []

    def one_round() -> None:
        ours.append(run_ours(model_dir, data_file, tmp_path / f"ours-{len(ours)}"))

    one_round()
    theirs = run_trl(model_dir, data_file, tmp_path / "trl")
    benchmark.pedantic(one_round, rounds=ROUNDS - 1, iterations=1)
    columns = zip(*map(astuple, ours), strict=True)
    median = Rates(*map(statistics.median, columns))
    assert abs(median.last_loss - theirs.last_loss) < 1e-4 * theirs.last_loss
    result = {
        "data": name,
        "model": "Llama, 4 layers, hidden 256, intermediate 704, 8 heads, 4 key-value heads, vocab 16384, float32",
        "settings": f"{PAIRS} pairs, {PAIRS_PER_STEP} per step, max_length 1024, 2 threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "rows": [
            {"stage": "train", "ours_pairs_per_s": median.train, "trl_pairs_per_s": theirs.train},
            {"stage": "precompute", "ours_pairs_per_s": median.precompute, "trl_pairs_per_s": theirs.precompute},
        ],
        "rounds": [vars(r) for r in ours],
        "last_loss": {"ours": median.last_loss, "trl": theirs.last_loss},
    }
    for row in result["rows"]:
        row["ratio"] = row["ours_pairs_per_s"] / row["trl_pairs_per_s"]
    benchmark.extra_info.update(result)
    write_result("train_vs_trl", result, columns=("stage", "ours_pairs_per_s", "trl_pairs_per_s", "ratio"))
