"""Loss curves of one run with each ``optim.master_weights``, and what their weights have learned: a plot and a table.

    python -m benchmarks.master_weights --model FOLDER --data FILE --picture docs/pictures/master-weights.png

What they are compared with is float32 weights that are computed with in float32. Computing in bfloat16 rounds float32
weights to the nearest number of bfloat16 in every forward pass, so that a curve does not show what they have learned
until they are half way to the next one. That curve is drawn, too.

The noise is how far runs of other seeds, so with another order of rows, are from each other. Finished runs below
``--output`` are read, not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from engine.config import build_config
from engine.evaluate import evaluate
from engine.train.loop import train

RUNS = {
    "float32": ("float32", "float32"),
    "float32 in bfloat16": ("float32", "bfloat16"),
    "stochastic": ("stochastic", "bfloat16"),
    "kahan": ("kahan", "bfloat16"),
}
"""Name -> optim.master_weights and model.dtype, which is what is computed in."""
EXACT = "float32"
SMOOTHED = 20
"""Steps of a moving average."""


def folder(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    return arguments.output / f"{name.replace(' ', '-')}-{seed}"


def values(dtype: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "model": {"model_name_or_path": str(arguments.model), "dtype": dtype},
        "data": {"dataset_name": str(arguments.data), "max_length": arguments.max_length},
        "packing": {"pairs_per_step": arguments.pairs, "tokens_per_pack": arguments.pairs * arguments.max_length},
    }


def losses(name: str, seed: int, arguments: argparse.Namespace) -> torch.Tensor:
    """float64: the loss of every step of a run, as a moving average."""
    weights, dtype = RUNS[name]
    output = folder(name, seed, arguments)
    if not (output / "manifest.json").exists():
        config = values(dtype, arguments) | {
            "optim": {"master_weights": weights, "learning_rate": arguments.learning_rate},
            "train": {"output_dir": str(output), "max_steps": arguments.steps, "seed": seed, "logging_steps": 1}
            | {"report_to": [], "save_steps": None},
        }
        train(build_config(config, "benchmarks.master_weights"), resume=output.exists())
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)
    return steps.unfold(0, SMOOTHED, 1).mean(1)


def margin(name: str, seed: int, dtype: str, arguments: argparse.Namespace) -> float:
    """Mean reward margin of the rows by the weights that a run ended with, computed in ``dtype``."""
    config = values(dtype, arguments)
    config["data"] |= {"eval_dataset_name": str(arguments.evaluated or arguments.data)}
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(build_config(config, "benchmarks.master_weights"), str(folder(name, seed, arguments)))
    return found["eval_rewards/margins"]


def draw(curves: dict[str, torch.Tensor], picture: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    for name, curve in curves.items():
        steps = range(SMOOTHED, SMOOTHED + len(curve))
        above.plot(steps, curve, label=name, linewidth=1)
        below.plot(steps, curve - curves[EXACT], linewidth=1)
    above.set_title(title, fontsize=9)
    above.set_ylabel(f"loss, mean of {SMOOTHED} steps")
    above.legend(fontsize=8)
    below.set_ylabel("minus float32")
    below.set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--evaluated", type=Path, help="rows whose margins are measured; by default those of --data")
    parser.add_argument("--output", type=Path, default=Path("runs/master-weights"))
    parser.add_argument("--picture", type=Path, default=Path("master-weights.png"))
    parser.add_argument("--runs", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    arguments = parser.parse_args()
    seeds = range(1, arguments.seeds + 1)
    curves = {
        name: [losses(name, seed, arguments) for seed in seeds] for name in dict.fromkeys([EXACT, *arguments.runs])
    }
    apart = [(one - other).abs() for one, other in combinations(curves[EXACT], 2)]
    if apart:
        print(f"noise: mean {torch.stack(apart).mean():.5f}, most {torch.stack(apart).max():.5f}")
    for name, of_seeds in curves.items():
        far = torch.stack([(one - exact).abs() for one, exact in zip(of_seeds, curves[EXACT], strict=True)])
        margins = [[margin(name, seed, dtype, arguments) for seed in seeds] for dtype in ("float32", "bfloat16")]
        shown = ", ".join(f"{sum(found) / len(found):.4f}" for found in margins)
        last = sum(float(curve[-1]) for curve in of_seeds) / len(of_seeds)
        print(f"{name:<20} last {last:.4f}  from float32: mean {far.mean():.5f}, most {far.max():.5f}  margins {shown}")
    first = {name: of_seeds[0] for name, of_seeds in curves.items()}
    draw(first, arguments.picture, f"DPO, {arguments.steps} steps of {arguments.pairs} pairs")


if __name__ == "__main__":
    main()
