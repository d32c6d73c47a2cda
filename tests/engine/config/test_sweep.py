"""A file of many runs."""

from __future__ import annotations

import pytest

from engine.config import load_config
from engine.config.sweep import load_sweep
from engine.errors import UserError

BASE = """
model: {model_name_or_path: m}
data: {dataset_name: pairs.jsonl}
loss: {label_smoothing: 0.1}
train: {output_dir: runs/s}
"""


@pytest.fixture
def sweep_file(tmp_path):
    def write(sweep: str):
        path = tmp_path / "sweep.yaml"
        path.write_text(BASE + sweep)
        return path

    return write


def test_every_combination_has_a_name_and_a_folder(sweep_file):
    path = sweep_file("sweep:\n  loss.beta: [0.05, 1]\n  loss.loss_type: [robust, [sigmoid, sft]]\n")
    runs = load_sweep(path, ["--optim.learning_rate", "1e-5"])
    assert [run.name for run in runs] == [
        "beta=0.05,loss_type=robust",
        "beta=0.05,loss_type=sigmoid+sft",
        "beta=1,loss_type=robust",
        "beta=1,loss_type=sigmoid+sft",
    ]
    assert [run.config.loss.beta for run in runs] == [0.05, 0.05, 1, 1]
    assert runs[3].config.train.output_dir == "runs/s/beta=1,loss_type=sigmoid+sft"
    assert {run.config.loss.label_smoothing for run in runs} == {0.1}
    assert {run.config.optim.learning_rate for run in runs} == {1e-5}


def test_keys_of_one_name_and_odd_values(sweep_file):
    path = sweep_file("sweep:\n  train.run_name: [null, a/b]\n  train.project: [x]\n")
    assert [run.name for run in load_sweep(path)] == [
        "run_name=null,project=x",
        "run_name=a_b,project=x",
    ]


def test_values_are_those_of_their_key(sweep_file):
    """YAML 1.1 reads ``1e-6`` as text and ``1`` as a whole number."""
    runs = load_sweep(sweep_file("sweep: {optim.learning_rate: [1e-6, 2.0e-5], loss.beta: [1], loss.loss_type: [dpo]}"))
    assert [run.name for run in runs] == [f"learning_rate={rate},beta=1,loss_type=dpo" for rate in ("1e-06", "2e-05")]
    assert [run.config.optim.learning_rate for run in runs] == [1e-6, 2e-5]


@pytest.mark.parametrize(
    ("sweep", "overrides", "words"),
    [
        ("", [], "a sweep needs a section sweep with lists of values"),
        ("sweep: {loss.bta: [1]}", [], "line 6: sweep.loss.bta: unknown key; did you mean loss.beta"),
        ("sweep: {loss.beta: 0.1}", [], "sweep.loss.beta: expected a list of values to try, got 0.1"),
        ("sweep: {loss.beta: []}", [], "expected a list of values"),
        ("sweep: {loss.beta: [0.1, low]}", [], "run beta=low: sweep.loss.beta: expected a number"),
        ("sweep: {loss.beta: [0.1, -1]}", [], "run beta=-1: sweep.loss.beta must be positive"),
        ("sweep: {loss.beta: [0.1, 0.10]}", [], "two runs of the sweep would be called beta=0.1"),
        ("sweep: {optim.learning_rate: [1e-6, 1.0e-6]}", [], "would be called learning_rate=1e-06: give each"),
        ("sweep: {loss.loss_type: [dpo, sigmoid]}", [], "runs loss_type=dpo and loss_type=sigmoid of the sweep"),
        ("sweep: {loss.beta: ['0.10', 0.1]}", [], "two runs of the sweep would be called beta=0.1"),
        ("sweep: {train.output_dir: [a, b]}", [], "every run has a folder of its own"),
        ("sweep: {loss.beta: [0.1]}", ["--loss.beta", "1"], "it is swept and set by --loss.beta"),
    ],
)
def test_what_is_no_sweep(sweep, overrides, words, sweep_file):
    with pytest.raises(UserError, match=words):
        load_sweep(sweep_file(sweep), overrides)


def test_other_commands_say_what_the_file_is(sweep_file):
    with pytest.raises(UserError, match="describes a sweep of several runs: `dpo sweep"):
        load_config(sweep_file("sweep: {loss.beta: [0.1]}"))
