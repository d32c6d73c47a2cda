"""The methods: four are losses of the engine, run by ``dpo sweep``; unlikelihood is a loop of its own on the op."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import LlamaForCausalLM

from dpo_kernels.hf import attach_head, response_logps
from engine.cli import main as dpo
from engine.config.sweep import load_sweep

from .exact import Point, answer_logps, point, rewards
from .reference import padded
from .size import Size


class Evaluation(NamedTuple):
    """One point of the picture."""

    method: str
    run: str
    """What sets it apart from other runs of the method, such as ``beta=0.5``."""
    pairs: int
    """That it was trained on."""
    step: int
    point: Point


class Workspace(NamedTuple):
    """Where things lie."""

    folder: Path

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held-out.jsonl"

    def sweep(self, method: str) -> Path:
        return self.folder / f"{method}.yaml"


def sweeps(size: Size, pairs: int) -> dict[str, dict[str, list[Any]]]:
    """Method -> section ``sweep`` of its file. Every run takes the same steps, however many pairs it has."""
    rows = [max(1, round(pairs * fraction)) for fraction in size.fractions]

    def one(loss: str, **swept: tuple[float, ...]) -> dict[str, list[Any]]:
        return {"loss.loss_type": [loss], **{f"loss.{key}": list(values) for key, values in swept.items()}}

    return {
        "dpo": {**one("sigmoid", beta=size.dpo_betas), "data.max_rows": rows},
        # Of whole responses, as the paper has it; `ipo` is TRL's, a mean over tokens.
        "ipo": one("ipo_sum", beta=size.ipo_betas),
        "simpo": {**one("simpo", beta=size.simpo_betas), "optim.learning_rate": list(size.simpo_rates)},
        "preferred-ft": one("sft"),
    }


def write_sweeps(workspace: Workspace, size: Size, pairs: int) -> None:
    """The files that ``dpo sweep`` reads."""
    for method, swept in sweeps(size, pairs).items():
        values = {
            "model": {"model_name_or_path": str(workspace.reference), "dtype": "float32"},
            "data": {
                "dataset_name": str(workspace.pairs),
                "eval_dataset_name": str(workspace.held_out),
                "eval_dataset_split": "train",
                "cache": "none",
            },
            "packing": {"pairs_per_step": size.pairs_per_step, "tokens_per_pack": 16 * size.pairs_per_step},
            "optim": {"learning_rate": size.learning_rate},
            "reference": {"store": str(workspace.folder / "references")},
            "train": {
                "output_dir": str(workspace.folder / method),
                "max_steps": size.steps,
                "save_steps": size.steps // size.evaluations,
                "seed": size.seed,
                "token_metrics": False,
                "report_to": [],
            },
            "sweep": swept,
        }
        workspace.sweep(method).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def run_method(method: str, folder: Path, size: Size, ref_logps: Tensor) -> list[Evaluation]:
    """Train all runs of a method, and place each of their checkpoints by its exact reward and divergence."""
    workspace = Workspace(folder)
    pairs = [json.loads(line) for line in workspace.pairs.read_text(encoding="utf-8").splitlines()]
    if method == "unlikelihood":
        return list(_unlikelihood(workspace, pairs, size, ref_logps))
    path = workspace.sweep(method)
    if (code := dpo(["sweep", str(path)])) != 0:
        raise SystemExit(code)
    found = []
    for run in load_sweep(path):
        trained = len(pairs) if run.config.data.max_rows is None else run.config.data.max_rows
        swept = f"beta={run.config.loss.beta:g}" if "loss.beta" in sweeps(size, len(pairs))[method] else ""
        if method == "simpo":
            swept = f"learning_rate={run.config.optim.learning_rate:g}"
        checkpoints = Path(run.config.train.output_dir).glob("checkpoint-*")
        steps = sorted((int(path.name.rpartition("-")[2]), path) for path in checkpoints)
        for step, checkpoint in steps:
            model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
            found.append(Evaluation(method, swept, trained, step, _point(model, size, ref_logps)))
    return found


def _point(model: Any, size: Size, ref_logps: Tensor) -> Point:
    return point(answer_logps(model, size.max_tokens), ref_logps, rewards(size.max_tokens))


def _batches(pairs: list[dict[str, list[int]]], size: Size) -> Iterator[list[dict[str, list[int]]]]:
    """Pairs of each step, in a new order every epoch."""
    rng, left = random.Random(f"{size.seed}/order"), []
    while True:
        while len(left) < size.pairs_per_step:
            left += rng.sample(pairs, len(pairs))
        yield left[: size.pairs_per_step]
        left = left[size.pairs_per_step :]


def _unlikelihood(
    workspace: Workspace, pairs: list[dict[str, list[int]]], size: Size, ref_logps: Tensor
) -> Iterator[Evaluation]:
    """Makes chosen answers likelier and rejected ones less likely: -log p(chosen) + alpha log p(rejected).

    A baseline of the DPO paper (section 6), after Welleck et al. 2019, arXiv 1908.04319.
    """
    start = LlamaForCausalLM.from_pretrained(workspace.reference)
    for alpha in size.alphas:
        model = copy.deepcopy(start)
        attach_head(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, size.steps)
        for step, batch in zip(range(1, size.steps + 1), _batches(pairs, size), strict=False):
            sides = [[row["prompt_ids"] + row[side] for row in batch] for side in ("chosen_ids", "rejected_ids")]
            logps = model(**padded(sides[0] + sides[1]), objective=response_logps).view(-1, 2)
            (alpha * logps[:, 1] - logps[:, 0]).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % (size.steps // size.evaluations) == 0:
                yield Evaluation("unlikelihood", f"alpha={alpha:g}", len(pairs), step, _point(model, size, ref_logps))
