"""What of a TRL file is evaluated and saved, and how evaluations are compared."""

from __future__ import annotations

import pytest

from .convert.recipes import TRL, assert_stops, notes

EVALUATED = TRL + "eval_strategy: steps\neval_steps: 50\nsave_steps: 100\n"


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        ("eval_strategy: steps\neval_steps: 20\n", 20),
        ("eval_strategy: steps\nlogging_steps: 7\n", 7),
        ("eval_strategy: epoch\nnum_train_epochs: 1\n", None),
        ("eval_strategy: epoch\n", 1 / 3),
        ("eval_strategy: epoch\nnum_train_epochs: 4\n", 0.25),
        ("eval_strategy: epoch\nmax_steps: 10\n", None),
        ("eval_strategy: steps\neval_steps: 0.25\nmax_steps: 10\n", 0.25),
    ],
)
def test_evaluation(load, lines, steps):
    config = load(TRL + lines)
    assert config.data.eval_dataset_name == "d"
    assert config.train.eval_steps == steps


def test_no_evaluation_in_every_spelling(load):
    for line in ("eval_strategy: no\n", "eval_strategy: 'no'\n", "eval_steps: 10\n"):
        assert load(TRL + line).data.eval_dataset_name is None


@pytest.mark.parametrize("spelling", ["no", "'no'"])
def test_no_checkpoints_in_every_spelling(convert, load, spelling):
    text = TRL + f"save_strategy: {spelling}\n"
    assert notes(convert(text), "told")["save_strategy"] == "no -> train.save_steps null"
    assert load(text + "save_steps: 5\n").train.save_steps is None


@pytest.mark.parametrize(
    ("lines", "effect"),
    [("epoch", "told"), ("epoch\nnum_train_epochs: 1", "told"), ("epoch\nmax_steps: 9", "told"), ("best", "new")],
)
def test_other_save_strategies_are_explained(convert, lines, effect):
    assert "train.save_steps" in notes(convert(TRL + f"save_strategy: {lines}\n"), effect)["save_strategy"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", {"save_steps": 100}),
        ("metric_for_best_model: eval_rewards/margins\ngreater_is_better: true\n",
         {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": True}),
        ("metric_for_best_model: loss\n", {"metric_for_best_model": "loss"}),
        ("save_strategy: best\nmetric_for_best_model: loss\n", {"save_steps": 50}),
        ("save_strategy: epoch\neval_strategy: epoch\n", {"save_steps": 1 / 3, "eval_steps": 1 / 3}),
    ],
)  # fmt: skip
def test_the_best_checkpoint(load, convert, lines, expected):
    text = EVALUATED + "load_best_model_at_end: true\n"
    for key in ("eval_strategy", "save_steps"):
        if key in lines or (key == "save_steps" and "save_strategy" in lines):
            text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(key))
    train = load(text + lines).train
    assert train.load_best_model_at_end
    assert {key: getattr(train, key) for key in expected} == expected
    assert not notes(convert(text + lines), "new").keys() & {"load_best_model_at_end", "metric_for_best_model"}


@pytest.mark.parametrize("key", ["metric_for_best_model: loss", "greater_is_better: true"])
def test_what_nothing_is_compared_by_is_told(convert, key):
    found = convert(EVALUATED + key + "\n")
    assert notes(found, "told")[key.partition(":")[0]] == "no effect where evaluations are not compared"


def test_a_schedule_that_follows_a_metric_keeps_it(load):
    lines = "lr_scheduler_type: reduce_lr_on_plateau\nmetric_for_best_model: rewards/accuracies\n"
    assert load(EVALUATED + lines).train.metric_for_best_model == "rewards/accuracies"


@pytest.mark.parametrize("lines", ["", "eval_strategy: epoch\nnum_train_epochs: 1\n"])
def test_without_evaluations_there_is_no_best_and_that_is_loud(convert, load, lines):
    text = TRL + "load_best_model_at_end: true\nmetric_for_best_model: loss\n" + lines
    assert "the last model is written" in notes(convert(text), "new")["load_best_model_at_end"]
    assert not load(text).train.load_best_model_at_end


def test_checkpoints_that_no_evaluation_meets_stop(convert):
    text = EVALUATED.replace("100", "75") + "load_best_model_at_end: true\n"
    assert_stops(convert, text, "train.save_steps must be a multiple of train.eval_steps, got 75 and 50")


def test_names_for_trackers(load):
    train = load(TRL + "run_name: first\nproject: mine\n").train
    assert (train.run_name, train.project) == ("first", "mine")
    assert load(TRL + "run_name: null\n").train.run_name is None


@pytest.mark.parametrize(
    ("sets", "size", "expected"),
    [
        ("[{path: p, split: s}]", 20,
         {"dataset_name": "p", "dataset_train_split": "s[:-20]", "eval_dataset_name": "p",
          "eval_dataset_split": "s[-20:]"}),
        ("[{path: p}]", 0.1, {"dataset_name": "p", "dataset_train_split": "train", "eval_fraction": 0.1}),
        ("[{path: p}, {path: q, split: s}]", 5,
         {"datasets": [{"name": "p", "fraction": 1.0, "split": "train[:-3]", "eval_split": "train[-3:]"},
                       {"name": "q", "split": "s[:-2]", "fraction": 1.0, "eval_split": "s[-2:]"}]}),
    ],
)  # fmt: skip
def test_rows_that_are_split_off_are_held_out(convert, sets, size, expected):
    found = convert(f"model_name_or_path: m\ndatasets: {sets}\ntest_split_size: {size}\n")
    assert found.values["data"] == expected
    assert "held out" in notes(found, "new")["test_split_size"]
    evaluated = convert(f"model_name_or_path: m\ndatasets: {sets}\ntest_split_size: {size}\neval_strategy: steps\n")
    assert evaluated.values["train"]["eval_steps"] == 10


def test_rows_that_cannot_be_split_off_are_said_to_be_trained_on(convert):
    found = convert("model_name_or_path: m\ndatasets: [{path: p, split: 'train[:90%]'}]\ntest_split_size: 20\n")
    assert "all are trained on" in notes(found, "new")["test_split_size"]
