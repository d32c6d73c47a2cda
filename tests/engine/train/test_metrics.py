from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from engine.train.evaluation import evaluation_lines, format_evaluation
from engine.train.metrics import (
    TOKEN_NAMES,
    IntervalMeter,
    StepWork,
)
from engine.train.progress import log_line

CPU = torch.device("cpu")
WORK = StepWork(pairs=4, unshared_tokens=100, packed_tokens=60, rows=64, flop=1e9)
NAMES = [
    "step", "epoch", "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens", "perf/tokens_per_second",
    "perf/pairs_per_second", "perf/mfu", "perf/padding_fraction", "perf/shared_fraction", "perf/peak_memory_gib",
]  # fmt: skip


def meter_at(seconds: list[float], peak_flops: float = 1e9) -> IntervalMeter:
    meter = IntervalMeter(CPU, peak_flops=peak_flops)
    clock = iter(seconds)
    meter.watch.seconds = lambda: next(clock)
    return meter


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_row_is_the_mean_over_the_steps_of_the_interval():
    meter = meter_at([2.0, 6.0])
    meter.add(values(1, 2, 3, 0, -1, -10, -20), WORK)
    meter.add(values(3, 4, 5, 1, -1, -30, -40), WORK)
    row = meter.row(step=2, epoch=0.5, grad_norm=torch.tensor(7.0), learning_rate=0.1)
    assert list(row) == NAMES
    assert [row[n] for n in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")] == [2, 3, 4, 0.5]
    assert [row[n] for n in ("rewards/margins", "logps/chosen", "logps/rejected")] == [-1, -20, -30]
    assert (row["grad_norm"], row["learning_rate"], row["num_tokens"]) == (7.0, 0.1, 200)
    assert (row["perf/tokens_per_second"], row["perf/pairs_per_second"], row["perf/mfu"]) == (100, 4, 1.0)
    assert row["perf/padding_fraction"] == pytest.approx(4 / 64)
    assert row["perf/shared_fraction"] == pytest.approx(0.4)
    meter.add(values(5, 0, 0, 0, 0, 0, 0), WORK)
    row = meter.row(step=3, epoch=0.75, grad_norm=torch.tensor(1.0), learning_rate=0.1)
    assert (row["loss"], row["num_tokens"], row["perf/pairs_per_second"]) == (5, 300, 1)
    assert json.loads(json.dumps(row)) == row
    meter = meter_at([2.0])
    for cells in (20, 30):
        meter.add(values(*range(7)), replace(WORK, mixer_tokens=18, mixer_cells=cells))
    row = meter.row(step=2, epoch=0.5, grad_norm=torch.tensor(7.0), learning_rate=0.1)
    assert row["perf/mixer_padding"] == pytest.approx(14 / 50)


def test_token_metrics_are_means_over_the_steps_that_have_them():
    """Switched on at a resume in the middle of an interval."""
    first = meter_at([1.0])
    first.add(values(*range(7)), WORK)
    second = meter_at([1.0])
    second.load(json.loads(json.dumps(first.state())))
    second.add(values(*range(7), -3, -4, 2, 0.5), WORK)
    second.add(values(*range(7), -5, -4, 4, 1), WORK)
    row = second.row(step=3, epoch=1, grad_norm=torch.tensor(1.0), learning_rate=1)
    assert [row[name] for name in TOKEN_NAMES] == [-4, -4, 3, 0.75]
    assert row["rewards/chosen"] == 1


def test_a_restored_meter_gives_the_row_that_an_uninterrupted_one_gives():
    first = meter_at([1.0])
    first.add(values(0.1, 1, 2, 1, 3, -1, -2), WORK)
    state = json.loads(json.dumps(first.state()))
    second = meter_at([1.0])
    second.load(state)
    for meter in (first, second):
        meter.add(values(0.2, 1, 2, 1, 3, -1, -2), WORK)
    rows = [m.row(step=2, epoch=1, grad_norm=torch.tensor(1.0), learning_rate=1) for m in (first, second)]
    assert {k: v for k, v in rows[0].items() if "perf/" not in k} == {
        k: v for k, v in rows[1].items() if "perf/" not in k
    }


def test_shares_of_experts_and_their_balance_are_those_of_the_interval():
    first, second = meter_at([1.0, 2.0]), meter_at([1.0])
    layers = [values(6, 2, 0, 0), values(1, 1, 1, 5)]
    first.add(values(*range(7)), WORK, aux_loss=values(2)[0], expert_tokens=layers)
    second.load(json.loads(json.dumps(first.state())))
    for meter in (first, second):
        meter.add(values(*range(7)), WORK, aux_loss=values(4)[0], expert_tokens=[layers[1], layers[1]])
        row = meter.row(step=2, epoch=1, grad_norm=torch.tensor(1.0), learning_rate=1)
        assert row["aux_loss"] == 3
        assert {name: share for name, share in row.items() if name.startswith("experts/")} == {
            "experts/busiest": 10 / 16,
            "experts/idlest": 1 / 16,
            "experts/layer_0/busiest": 7 / 16,
            "experts/layer_0/idlest": 1 / 16,
            "experts/layer_1/busiest": 10 / 16,
            "experts/layer_1/idlest": 2 / 16,
        }
    first.add(values(*range(7)), WORK)
    row = first.row(step=3, epoch=1, grad_norm=torch.tensor(1.0), learning_rate=1)
    assert list(row) == NAMES


def test_lines_for_people_name_what_matters():
    meter = meter_at([1.0])
    meter.add(values(0.6931, 1, 2, 0.5, 0.25, -1, -2), WORK)
    row = meter.row(step=10, epoch=0.5, grad_norm=torch.tensor(2.0), learning_rate=1e-6)
    line = log_line(row, total_steps=40, seconds_left=3725)
    for part in ("step 10/40", "loss 0.6931", "accuracy 0.5000", "lr 1.000e-06", "4.0 pairs/s", "left 1:02:05"):
        assert part in line
    assert "aux" not in line
    whole = log_line(row | {"aux_loss": 1.25}, total_steps=40, seconds_left=3725)
    assert whole.startswith("step 10/40  epoch 0.50  loss 0.6931  aux 1.250  accuracy 0.5000  ")
    for width in range(20, len(whole) + 1):
        line = log_line(row | {"aux_loss": 1.25}, total_steps=40, seconds_left=3725, width=width)
        assert len(line) <= max(width, len("step 10/40  loss 0.6931"))
        assert [part for part in whole.split("  ") if part in line] == line.split("  ")
    assert line == whole
    assert "left 1:02:05" in log_line(row, total_steps=40, seconds_left=3725, width=80)
    metrics = {"loss": 0.5, "rewards/accuracies": 1.0, "rewards/margins": 2.0}
    sets = [{f"{split}_{name}": value for name, value in metrics.items()} for split in ("eval", "eval_a", "eval_b")]
    (line,) = evaluation_lines({"step": 4, **sets[0]})
    assert line == "step 4  eval loss 0.5000  accuracy 1.000  margin 2.000"
    _, line = evaluation_lines({"step": 4, **sets[1], **sets[2]})
    assert line == "step 4  eval b loss 0.5000  accuracy 1.000  margin 2.000"


def test_lines_of_rows_that_are_each_desirable_or_not():
    meter = meter_at([1.0])
    further = {"kl": torch.tensor(0.25), "count/chosen": torch.tensor(1.0), "count/rejected": torch.tensor(3.0)}
    meter.add(values(0.6931, 1, math.nan, 0.5, math.nan, -1, math.nan), WORK, further=further)
    row = meter.row(step=10, epoch=0.5, grad_norm=torch.tensor(2.0), learning_rate=1e-6)
    line = log_line(row, total_steps=40, seconds_left=3725)
    assert "accuracy 0.5000  kl 0.2500  " in line
    assert "4.0 rows/s" in line
    assert "pair" not in line
    metrics = {"eval_loss": 0.5, "eval_rewards/accuracies": 1.0, "eval_kl": 0.125, "eval_count/chosen": 3.0}
    (line,) = evaluation_lines({"step": 4, **metrics})
    assert line == "step 4  eval loss 0.5000  accuracy 1.000  kl 0.1250"
    metrics |= {"eval_num_pairs": 3.0, "eval_accuracies_by_length/1-32": 1.0, "eval_num_pairs/1-32": 3.0}
    heads = format_evaluation(metrics).splitlines()
    assert "tokens of the longest response     accuracy     rows" in heads
