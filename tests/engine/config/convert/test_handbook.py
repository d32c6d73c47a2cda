"""The alignment-handbook's files: TRL's keys, with mixtures of its own."""

from __future__ import annotations

import pytest

from .recipes import assert_stops, notes

FILE = "recipe.yaml"
MINIMAL = "model_name_or_path: m\ndataset_mixer: {d: 1.0}\ndataset_splits: [train_prefs, test_prefs]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL, {"data.dataset_train_split": "train_prefs", "data.eval_dataset_name": None}),
        (MINIMAL.replace("1.0", "0.5"), {"data.dataset_train_split": "train_prefs[:50%]"}),
        (MINIMAL + "eval_strategy: steps\neval_steps: 7\n",
         {"data.eval_dataset_name": "d", "data.eval_dataset_split": "test_prefs", "train.eval_steps": 7}),
        (MINIMAL + "eval_strategy: steps\neval_steps: 7\nsave_steps: 14\n"
         "load_best_model_at_end: true\nwandb_project: p\n",
         {"train.load_best_model_at_end": True, "train.project": "p"}),
        (MINIMAL + "label_smoothing: 0.1\n", {"loss.label_smoothing": 0.1, "loss.router_aux_loss_coef": 0}),
        (MINIMAL + "rpo_alpha: 0.5\nchat_template: chat.jinja\n",
         {"loss.rpo_alpha": 0.5, "data.chat_template": "chat.jinja"}),
        ("model_name_or_path: m\ndataset_mixer: {d: 1.0}\n", {"data.dataset_name": "d"}),
        ("model_name_or_path: m\ndataset_mixture:\n  datasets:\n  - {id: d, config: c, split: s}\n"
         "  test_split_size: 0.1\neval_strategy: epoch\n",
         {"data.dataset_name": "d", "data.dataset_config": "c", "data.dataset_train_split": "s",
          "data.eval_fraction": 0.1}),
        ("model_name_or_path: m\ndataset_mixture:\n  datasets:\n  - {id: d, split: s}\n  test_split_size: 20\n",
         {"data.dataset_train_split": "s[:-20]", "data.eval_dataset_split": "s[-20:]"}),
    ],
)  # fmt: skip
def test_keys_are_converted(run, text, expected):
    found = run(text)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (MINIMAL + "chat_template: '{% for m in messages %}'\n", "chat_template: a template is read from a file"),
        (MINIMAL.replace("{d: 1.0}", "[d]"), "dataset_mixer: expected a mapping"),
        ("dataset_mixture: {seed: 1}\n", "dataset_mixture: expected a list of datasets, each with an id"),
        (MINIMAL + "max_lengthh: 5\n", "did you mean max_length?"),
    ],
)
def test_what_would_be_lost_stops(converted, text, part):
    assert_stops(converted, text, part)


def test_what_differs_is_loud(converted):
    changed = notes(converted(MINIMAL + "max_prompt_length: 512\nrpo_alpha: 1.0\n"), "new")
    assert {"max_prompt_length", "rpo_alpha"} <= set(changed)
