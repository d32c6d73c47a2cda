"""Loss curves of one run with each ``optim.master_weights``, beside the noise of float32 weights: a plot.

    python -m benchmarks.master_weights --model FOLDER --data FILE --picture docs/pictures/master-weights.png

Runs with float32 weights differ in their seed, so in the order of rows: that is the noise. The others have the first
seed, so the same rows in the same order. Finished runs below ``--output`` are read, not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from engine.config import build_config
from engine.train.loop import train

RUNS = {"float32": ("float32", 1), "float32, other rows": ("float32", 2), "stochastic": ("stochastic", 1)} | {
    "kahan": ("kahan", 1)
}
"""Name -> optim.master_weights and train.seed."""
SMOOTHED = 20
"""Steps of a moving average."""


def losses(name: str, arguments: argparse.Namespace) -> list[float]:
    """The loss of every step of a run."""
    weights, seed = RUNS[name]
    output = arguments.output / name.replace(", ", "-").replace(" ", "-")
    metrics = output / "metrics.jsonl"
    if not (output / "manifest.json").exists():
        values = {
            "model": {"model_name_or_path": str(arguments.model)},
            "data": {"dataset_name": str(arguments.data), "max_length": arguments.max_length},
            "packing": {"pairs_per_step": arguments.pairs, "tokens_per_pack": arguments.pairs * arguments.max_length},
            "optim": {"master_weights": weights, "learning_rate": arguments.learning_rate},
            "train": {"output_dir": str(output), "max_steps": arguments.steps, "seed": seed, "logging_steps": 1}
            | {"report_to": [], "save_steps": None},
        }
        train(build_config(values, "benchmarks.master_weights"), resume=output.exists())
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def smoothed(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unfold(0, SMOOTHED, 1).mean(1)


def draw(curves: dict[str, torch.Tensor], picture: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    exact = curves["float32"]
    for name, curve in curves.items():
        steps = range(SMOOTHED, SMOOTHED + len(curve))
        style = {"color": "0.6"} if name.startswith("float32,") else {}
        above.plot(steps, curve, label=name, linewidth=1, **style)
        below.plot(steps, curve - exact, linewidth=1, **style)
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
    parser.add_argument("--output", type=Path, default=Path("runs/master-weights"))
    parser.add_argument("--picture", type=Path, default=Path("master-weights.png"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    arguments = parser.parse_args()
    curves = {name: smoothed(losses(name, arguments)) for name in RUNS}
    for name, curve in curves.items():
        far = (curve - curves["float32"]).abs()
        print(f"{name:<20} last {curve[-1]:.4f}  from float32: mean {far.mean():.5f}, most {far.max():.5f}")
    draw(curves, arguments.picture, f"DPO, {arguments.steps} steps of {arguments.pairs} pairs")


if __name__ == "__main__":
    main()
