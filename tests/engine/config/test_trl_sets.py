"""Data sets of a TRL file."""

from __future__ import annotations

import json

import pytest

from .convert.recipes import TRL, assert_stops, notes


def test_a_mixture_of_one_is_a_dataset_and_of_two_are_sets(convert):
    one = convert("model_name_or_path: m\ndatasets:\n- {path: p, name: n, split: s}\n")
    assert one.values["data"] == {"dataset_name": "p", "dataset_config": "n", "dataset_train_split": "s"}
    two = convert(
        "model_name_or_path: m\ndatasets:\n- {path: p, split: s}\n- {path: q, name: c}\ntest_split_size: 0.1\n"
    )
    assert two.values["data"] == {
        "datasets": [{"name": "p", "split": "s", "fraction": 1.0}, {"name": "q", "config": "c", "fraction": 1.0}],
        "eval_fraction": 0.1,
    }
    shares = convert("model_name_or_path: m\ndatasets:\n- {path: p, fraction: 0.2}\n- {path: q, fraction: 0.8}\n")
    assert [one["weight"] for one in shares.values["data"]["datasets"]] == [0.2, 0.8]


def test_files_of_a_set(convert):
    files = convert("model_name_or_path: m\ndatasets:\n- {path: p, data_files: x.jsonl}\neval_strategy: steps\n")
    assert files.values["data"]["datasets"] == [{"name": "p", "data_files": ["x.jsonl"], "fraction": 1.0}]
    assert "none are evaluated" in notes(files, "new")["eval_strategy"]


@pytest.mark.parametrize(
    ("split", "given", "part"),
    [(None, "x.jsonl", {}), ("train[:50%]", "x.jsonl", {"split": "train[:50%]"}), ("test", "y.jsonl", {})],
)
def test_files_by_split_are_those_of_the_split_alone(convert, split, given, part):
    one = {"path": "p", "data_files": {"train": "x.jsonl", "test": "y.jsonl"}, "split": split}
    converted = convert(f"model_name_or_path: m\ndatasets:\n- {json.dumps(one)}\n")
    assert converted.values["data"]["datasets"] == [{"name": "p", **part, "data_files": [given], "fraction": 1.0}]


def test_files_beside_a_name_stop(convert):
    assert_stops(convert, TRL + "data_files: x.jsonl\n", "trl.yaml, line 3: data_files: ", "in datasets alone")


@pytest.mark.parametrize(
    ("one", "part"),
    [
        ("{path: p, data_dir: x}", "each set needs a path"),
        ("{path: p, split: dev, data_files: {train: x.jsonl}}", "data_files of p have no split 'dev'; they have train"),
    ],
)
def test_sets_that_cannot_be_read_stop(convert, one, part):
    assert_stops(convert, TRL + f"datasets:\n- {one}\n", f"trl.yaml, line 3: datasets: {part}")
