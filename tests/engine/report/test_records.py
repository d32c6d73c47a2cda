"""Reading run folders, whole, growing and damaged."""

from __future__ import annotations

import json
import math

import pytest

from engine.durable import seal
from engine.errors import UserError
from engine.report.records import read_run


def test_series_hold_the_logged_numbers(make_run, rows):
    logged = rows(20, eval_every=10)
    run = read_run(make_run(logged))
    loss = run.series("loss")
    assert loss.steps.tolist() == list(range(1, 21))
    assert loss.values.tolist() == [row["loss"] for row in logged if "loss" in row]
    assert run.series("eval_loss").steps.tolist() == [10, 20]
    assert (run.first_step, run.last_step) == (1, 20)
    assert run.series("perf/mfu") is None
    assert run.series("no_such_metric") is None


def test_half_written_last_line_is_left_out(make_run, rows):
    folder = make_run(rows(3))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.')
    assert read_run(folder).last_step == 3


def test_broken_line_in_the_middle_is_named(make_run, rows):
    folder = make_run(rows(3))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:-5]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged: repair"):
        read_run(folder)


@pytest.mark.parametrize("line", ["[1, 2]", '{"loss": 0.5}', '{"step": "one"}', '{"step": true}', '{"step": NaN}', ""])
def test_line_without_a_step_is_named(make_run, line):
    folder = make_run([])
    (folder / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is damaged: repair"):
        read_run(folder)


def test_a_resumed_run_replaces_repeated_steps(make_run, rows):
    logged = rows(6, eval_every=3)
    again = [{**row, "loss": 9.0} for row in logged if row["step"] in (5, 6) and "loss" in row]
    run = read_run(make_run(logged + again))
    assert run.series("loss").values.tolist() == [row["loss"] for row in logged if "loss" in row][:4] + [9.0, 9.0]
    assert len(run.series("eval_loss")) == 2


def test_non_finite_values_become_gaps(make_run):
    run = read_run(make_run([{"step": 1, "loss": 0.7}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]))
    loss = run.series("loss")
    assert math.isnan(loss.values[1])
    assert math.isnan(loss.values[2])
    assert loss.last == 0.7


@pytest.mark.parametrize("content", ["", '{"step": 1'])
def test_a_run_that_has_logged_nothing_says_so(make_run, content):
    folder = make_run([])
    (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match="holds no complete line yet"):
        read_run(folder)


def test_missing_folder_and_missing_metrics(tmp_path):
    with pytest.raises(UserError, match="no run folder at"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["data.json", "evaluation.json"])
def test_damaged_json_is_named(make_run, rows, name):
    folder = make_run(rows(1))
    (folder / name).write_text("{")
    with pytest.raises(UserError, match=f"{name} line 1 is not JSON"):
        read_run(folder)
    (folder / name).write_text(json.dumps([1]))
    with pytest.raises(UserError, match=f"{name} holds a list"):
        read_run(folder)


def test_damaged_config_is_named(make_run, rows):
    with pytest.raises(UserError, match=r"config\.yaml is not YAML") as caught:
        read_run(make_run(rows(1), config="model: [1, 2\ndata: 3"))
    assert "\n" not in str(caught.value)


def test_finished_means_that_the_model_is_whole(make_run, rows):
    folder = make_run(rows(1))
    (folder / "model.safetensors").write_bytes(b"12345678")
    assert not read_run(folder).finished
    seal(folder)
    assert read_run(folder).finished
    (folder / "model.safetensors").write_bytes(b"1234")
    assert not read_run(folder).finished
