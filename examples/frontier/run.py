"""The whole example: a reference, pairs, every method, and what came of them."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from engine.errors import UserError
from engine.plain_json import to_json

from .curves import by_pairs, compare
from .exact import Point, answer_logps, best_reward, by_reward, point, rewards
from .methods import Evaluation, Workspace, run_method, write_sweeps
from .picture import LABELS, draw_by_pairs, draw_frontiers
from .reference import make_reference, write_pairs
from .size import METHODS, Size

SETTINGS = "settings.json"
POINTS = "points.csv"
RESULT = "result.json"


class Result(NamedTuple):
    """What came of it."""

    evaluations: list[Evaluation]
    start: Point
    """The reference."""
    ref_logps: Tensor
    """float64 [prompts, answers], exact."""
    against: dict[str, dict[str, float]]
    """Of ``curves.compare``."""
    shares: dict[int, float]
    """Of ``curves.by_pairs``."""


def run(folder: Path, size: Size, *, jobs: int) -> Result:
    """Make everything in ``folder``, or go on where an earlier call with the same ``size`` was killed.

    Args:
        jobs: processes beside this one, of one thread each; 0 runs all methods in this one.

    Raises:
        UserError: the folder holds something else.
    """
    began = time.perf_counter()
    transformers_logging.disable_progress_bar()
    _prepare(folder, size)
    workspace = Workspace(folder)
    if not (workspace.reference / "tokenizer_config.json").exists():
        make_reference(workspace.reference, size)
    reference = LlamaForCausalLM.from_pretrained(workspace.reference).eval()
    ref_logps, values = answer_logps(reference, size.max_tokens), rewards(size.max_tokens)
    start = point(ref_logps, ref_logps, values)
    pairs = write_pairs(workspace.pairs, size.prompts, ref_logps, size, "train")
    write_pairs(workspace.held_out, size.held_out, ref_logps, size, "held-out")
    write_sweeps(workspace, size, pairs)
    print(
        f"{ref_logps.numel():,} answers enumerated, the reference's reward is {start.reward:.3f}; {pairs:,} pairs",
        flush=True,
    )
    found = {}
    for method, evaluations in _methods(folder, size, ref_logps, jobs):
        found[method] = evaluations
        print(
            f"{LABELS[method]}: {len(evaluations)} evaluations, after {time.perf_counter() - began:.0f} s", flush=True
        )
    evaluations = [one for method in METHODS for one in found[method]]
    given = (evaluations, start, *by_reward(ref_logps, values))
    result = Result(evaluations, start, ref_logps, compare(*given), by_pairs(*given))
    _write(folder, result, *by_reward(ref_logps, values))
    return result


def _prepare(folder: Path, size: Size) -> None:
    settings = to_json(dataclasses.asdict(size), indent=1) + "\n"
    path = folder / SETTINGS
    if folder.is_dir() and any(folder.iterdir()):
        if not path.is_file() or path.read_text(encoding="utf-8") != settings:
            raise UserError(f"{folder} holds other files than this run's: remove it, or choose another with --output")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(settings, encoding="utf-8")


def _methods(folder: Path, size: Size, ref_logps: Tensor, jobs: int) -> Iterator[tuple[str, list[Evaluation]]]:
    if jobs == 0:
        for method in METHODS:
            yield method, run_method(method, folder, size, ref_logps)
        return
    print(f"training; {jobs} processes write what they say to {folder / '*.log'}", flush=True)
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = {pool.submit(_in_child, method, folder, size, ref_logps.numpy()): method for method in METHODS}
        for task in as_completed(tasks):
            yield tasks[task], task.result()


def _in_child(method: str, folder: Path, size: Size, ref_logps: object) -> list[Evaluation]:
    """``run_method`` with a thread and a log file of its own."""
    log = os.open(folder / f"{method}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    torch.set_num_threads(1)
    return run_method(method, folder, size, torch.as_tensor(ref_logps))


def _write(folder: Path, result: Result, ref_logps: Tensor, values: Tensor) -> None:
    """Files and pictures, from what ``by_reward`` gives."""
    with (folder / POINTS).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("method", "run", "pairs", "step", "kl", "reward", "best_reward_at_kl"))
        for one in result.evaluations:
            best = best_reward(one.point.kl, ref_logps, values)
            numbers = (f"{number:.6f}" for number in (*one.point, best))
            table.writerow((one.method, one.run, one.pairs, one.step, *numbers))
    record = {"reference_reward": result.start.reward, "against": result.against, "by_pairs": result.shares}
    (folder / RESULT).write_text(to_json(record, indent=1) + "\n", encoding="utf-8")
    drawn = (result.start, ref_logps, values)
    draw_frontiers(folder / "frontier.png", result.evaluations, *drawn)
    draw_by_pairs(folder / "by-pairs.png", result.evaluations, result.shares, *drawn)


def format_result(result: Result) -> str:
    """Two short tables for a terminal."""
    lines = [
        "share of the gain in reward that a policy can have at a KL, mean over KLs that DPO and the method reach",
        f"{'':<14}{'up to KL':>10}{'method':>10}{'DPO':>10}{'DPO above at':>15}",
    ]
    for method, row in result.against.items():
        shares = f"{row['other']:>10.1%}{row['dpo']:>10.1%}{row['above']:>15.0%}"
        lines.append(f"{LABELS[method]:<14}{row['to_kl']:>10.2f}{shares}")
    lines += ["", f"{'DPO, pairs':<14}{'share':>10}"]
    lines += [f"{pairs:<14,}{share:>10.1%}" for pairs, share in result.shares.items()]
    return "\n".join(lines)
