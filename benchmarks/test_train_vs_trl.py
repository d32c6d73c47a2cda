"""End-to-end training and reference precompute beside TRL 1.16, in one run on two CPU threads.

Both train the same model from the same folder in float32, one epoch over the same 128 pairs in source order, batches of
8 pairs, max_length 1024, AdamW, precomputed references, one log row per step with everything that they log. Ours runs
before and after TRL; medians are reported. Times are of the precompute pass and of the training loop, without loading,
tokenising and the start-up checks.

A hybrid model, most of whose layers have a gated delta net for attention, is trained in two layouts in the same run.
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
from engine.model import load_tokenizer
from engine.model.ready import ready_policy
from engine.reference import ReferenceStore, precompute
from engine.train.loop import train

trl = pytest.importorskip("trl")

PAIRS_PER_STEP = 8
ROUNDS = 3


@dataclass(frozen=True)
class Contest:
    """A model, and the layouts in which ours trains it."""

    model: str
    layouts: tuple[tuple[str, str], ...]
    """What ``packing.layout`` says, and what that is in the name of a stage."""
    hybrid: bool = False


CONTESTS = {
    "train_vs_trl": Contest(
        "Llama, 4 layers, hidden 256, intermediate 704, 8 heads, 4 key-value heads, vocab 16384, float32",
        (("auto", ""),),
    ),
    "train_hybrid_vs_trl": Contest(
        "Qwen3.5, 4 layers, 3 of them with a gated delta net (2 key heads and 4 value heads of 64), hidden 256, "
        "intermediate 704, 8 heads, 4 key-value heads, vocab 16384, float32",
        (("auto", ", mixers in rows"), ("rows", ", the whole model in rows")),
        hybrid=True,
    ),
}
"""By the name of the result."""


@dataclass(frozen=True)
class Rates:
    """Pairs per second, and the last loss to show that both did the same work."""

    precompute: float
    train: float
    last_loss: float


def make_job(contest: Contest, folder: Path) -> tuple[str, Path, Path]:
    """Name of the data, model folder, data file."""
    name, rows, texts = benchmark_rows()
    save_model(folder / "model", texts, hybrid=contest.hybrid)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name, folder / "model", folder / "pairs.jsonl"


def run_ours(model_dir: Path, data_file: Path, folder: Path, layout: str) -> Rates:
    folder.mkdir()
    (folder / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"model_name_or_path": str(model_dir), "dtype": "float32"},
                "data": {"dataset_name": str(data_file)},
                "packing": {"pairs_per_step": PAIRS_PER_STEP, "shuffle": False, "layout": layout},
                "reference": {"store": str(folder / "store")},
                "train": {"output_dir": str(folder / "run"), "logging_steps": 1, "save_steps": None},
            }
        )
    )
    config = load_config(folder / "run.yaml")
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="train")
    policy = ready_policy(config.model, torch.device("cpu"), [dataset], packing=config.packing)
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


@pytest.mark.parametrize("name", CONTESTS)
def test_train_vs_trl(name, benchmark, tmp_path):
    contest = CONTESTS[name]
    data, model_dir, data_file = make_job(contest, tmp_path)
    torch.set_num_threads(2)
    rounds: dict[str, list[Rates]] = {layout: [] for layout, _ in contest.layouts}

    def one_round() -> None:
        for layout, rates in rounds.items():
            rates.append(run_ours(model_dir, data_file, tmp_path / f"{layout}-{len(rates)}", layout))

    one_round()
    theirs = run_trl(model_dir, data_file, tmp_path / "trl")
    benchmark.pedantic(one_round, rounds=ROUNDS - 1, iterations=1)
    medians = {
        layout: Rates(*map(statistics.median, zip(*map(astuple, rates), strict=True)))
        for layout, rates in rounds.items()
    }
    for ours in medians.values():
        assert abs(ours.last_loss - theirs.last_loss) < 1e-4 * theirs.last_loss
    result = {
        "data": data,
        "model": contest.model,
        "settings": f"{PAIRS} pairs, {PAIRS_PER_STEP} per step, max_length 1024, 2 threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "rows": [
            {
                "stage": stage + words,
                "ours_pairs_per_s": getattr(medians[layout], stage),
                "trl_pairs_per_s": getattr(theirs, stage),
                "ratio": getattr(medians[layout], stage) / getattr(theirs, stage),
            }
            for layout, words in contest.layouts
            for stage in ("train", "precompute")
        ],
        "rounds": {layout: [vars(r) for r in rates] for layout, rates in rounds.items()},
        "last_loss": {**{layout: ours.last_loss for layout, ours in medians.items()}, "trl": theirs.last_loss},
    }
    benchmark.extra_info.update(result)
    write_result(name, result, columns=("stage", "ours_pairs_per_s", "trl_pairs_per_s", "ratio"))
