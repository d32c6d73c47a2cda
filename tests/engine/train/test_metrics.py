from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.errors import UserError
from engine.train.evaluation import evaluation_lines
from engine.train.metrics import (
    TOKEN_NAMES,
    IntervalMeter,
    JsonlTracker,
    StepWork,
    check_trackers,
    keep_rows_until,
    log_line,
    open_trackers,
)

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


def test_rows_past_a_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 0.5}) for s in (1, 2, 3)] + [json.dumps({"step": 2, "eval_loss": 1.0})]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    keep_rows_until(tmp_path, 2, evaluated_at=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]
    keep_rows_until(tmp_path, 2, evaluated_at=1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(line) for line in lines[:2]]
    tracker = JsonlTracker(tmp_path)
    tracker.log(3, {"step": 3})
    tracker.close()
    assert path.read_text().splitlines()[-1] == '{"step": 3}'
    keep_rows_until(tmp_path, 0, evaluated_at=0)
    assert path.read_text() == ""
    keep_rows_until(tmp_path / "nowhere", 0, evaluated_at=0)


@pytest.mark.parametrize(
    "damaged", [b"{", b"\xff\n", b'{"step" 2}\n', b'{"st\xf0p": 2}\n', b'{"step": null}\n', b"[2]\n", b"\n"]
)
def test_a_damaged_row_is_named(damaged, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + damaged + b'\n{"step": 3, "loss": 0.5}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged: repair or remove the line"):
        keep_rows_until(tmp_path, 3, evaluated_at=0)
    assert path.read_bytes() == before


def test_tensorboard_hides_events_past_a_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, steps in ((1, (1, 2, 3)), (3, (3, 4))):
        trackers = open_trackers(tmp_path, ("tensorboard",), first_step=first_step)
        for tracker in trackers:
            for step in steps:
                tracker.log(step, {"step": step, "loss": step + first_step * 0.1})
            tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    got = [(e.step, round(e.value, 3)) for e in events.Scalars("loss")]
    assert got == [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3)]


def test_wandb_continues_its_run_after_a_resume(tmp_path, monkeypatch):
    runs = []

    class Run(SimpleNamespace):
        def log(self, values):
            self.rows.append(values)

        def finish(self):
            self.finished = True

    def init(**options):
        runs.append(Run(options=options, id=options["id"] or "first", rows=[], finished=False))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError))
    (tmp_path / "config.yaml").write_text("loss: {beta: 0.2}\n")
    for step in (1, 2):
        trackers = open_trackers(tmp_path, ("wandb",), first_step=step)
        for tracker in trackers:
            tracker.log(step, {"step": step, "loss": 0.5})
            tracker.close()
    assert [run.id for run in runs] == ["first", "first"]
    assert [run.options["id"] for run in runs] == [None, "first"]
    assert runs[0].options["config"] == {"loss": {"beta": 0.2}}
    assert [run.rows for run in runs] == [[{"step": s, "loss": 0.5, "train/step": s}] for s in (1, 2)]
    assert all(run.finished for run in runs)


def test_a_tracker_that_is_not_installed_is_a_user_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(UserError, match=rf"report_to {name} needs {name}: pip install {name}"):
            check_trackers((name,))
    check_trackers(())


@pytest.mark.parametrize("mode", [None, "online", "offline", "disabled"])
def test_wandb_without_a_login_is_a_user_error(mode, tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api_key not configured")

    wandb = SimpleNamespace(init=refuse, login=refuse, Error=RuntimeError, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    with nullcontext() if mode in ("offline", "disabled") else pytest.raises(UserError, match="wandb login"):
        check_trackers(("wandb",))
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        open_trackers(tmp_path, ("wandb",), first_step=1)


def test_a_full_disk_is_a_user_error(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker._file.close()
    tracker._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.jsonl: no space left"):
        tracker.log(1, {"step": 1})


def test_tensorboard_on_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    tracker = open_trackers(tmp_path, ("tensorboard",), first_step=1)[1]

    def full(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(tracker._writer, "add_scalar", full)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: the file is larger"):
        tracker.log(1, {"step": 1, "loss": 0.5})


def test_lines_for_people_name_what_matters():
    meter = meter_at([1.0])
    meter.add(values(0.6931, 1, 2, 0.5, 0.25, -1, -2), WORK)
    row = meter.row(step=10, epoch=0.5, grad_norm=torch.tensor(2.0), learning_rate=1e-6)
    line = log_line(row, total_steps=40, seconds_left=3725)
    for part in ("step 10/40", "loss 0.6931", "accuracy 0.500", "lr 1.00e-06", "4.0 pairs/s", "left 1:02:05"):
        assert part in line
    metrics = {"loss": 0.5, "rewards/accuracies": 1.0, "rewards/margins": 2.0}
    sets = [{f"{split}_{name}": value for name, value in metrics.items()} for split in ("eval", "eval_a", "eval_b")]
    (line,) = evaluation_lines({"step": 4, **sets[0]})
    assert line == "step 4  eval loss 0.5000  accuracy 1.000  margin 2.0000"
    _, line = evaluation_lines({"step": 4, **sets[1], **sets[2]})
    assert line == "step 4  eval b loss 0.5000  accuracy 1.000  margin 2.0000"
