"""Whether completions end where generation stops, and what is said where none does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from engine.check import check
from engine.config import build_config
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.model.stops import stop_ids
from engine.train.loop import train

OWN_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|user|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Ends turns with a token of its own, as ChatML on a base model whose EOS is another."""
ROWS = [
    {key: [{"role": role, "content": f"{key} {i}"}] for key, role in (("prompt", "user"), ("chosen", "assistant"))}
    | {"rejected": [{"role": "assistant", "content": f"no {i}"}]}
    for i in range(6)
]


@pytest.fixture
def make(tmp_path, tiny_model_dir):
    """``make(template, stops)``: a configuration whose model stops at some tokens."""

    def make(template, stops, **data):
        model = tmp_path / "model"
        shutil.copytree(tiny_model_dir, model, dirs_exist_ok=True)
        GenerationConfig(eos_token_id=stops).save_pretrained(model)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        chat = {}
        if template is not None:
            (tmp_path / "own.jinja").write_text(template)
            chat = {"chat_template": str(tmp_path / "own.jinja")}
        return build_config(
            {
                "model": {"model_name_or_path": str(model), "dtype": "float32"},
                "data": {"dataset_name": str(tmp_path / "rows.jsonl"), **chat, **data},
                "reference": {"store": str(tmp_path / "store")},
                "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "report_to": []},
            },
            "test",
        )

    return make


@pytest.mark.parametrize(
    ("template", "stops", "said"),
    [
        (None, [2], False),
        (OWN_END, [2, 4], False),
        (OWN_END, [2], True),
    ],
)
def test_completions_that_end_where_nothing_stops(make, template, stops, said, caplog):
    config = make(template, stops)
    found = check(config)
    counts = found.reports["train"].counts
    words = "no completion teaches the model to stop: generation ends at '</s>', and completions end with '<|user|>'"
    assert (counts.get("other_end"), words in found.text, found.obstacles) == (6 if said else None, said, ())
    # A run says the same, ends as check does, and keeps the count.
    train(config)
    assert (words in caplog.text) == said
    lint = json.loads((Path(config.train.output_dir) / "data.json").read_text())["lint"]
    assert lint["counts"].get("other_end") == counts.get("other_end")


def test_strict_stops_check_and_run(make):
    config = make(OWN_END, [2], strict=True)
    assert any("other_end in 6 of 6 rows" in reason for reason in check(config).obstacles)
    with pytest.raises(UserError, match="other_end in 6 of 6 rows"):
        train(config)


def test_completions_that_are_cut_say_nothing(make):
    found = check(make(OWN_END, [2], max_length=8))
    assert "other_end" not in found.reports["train"].counts
    assert "teaches the model to stop" not in found.text


def test_stops_are_of_tokenizer_and_generation_config(make, tiny_tokenizer):
    config = make(None, [4, 5])
    assert stop_ids(config.model, tiny_tokenizer) == {2, 4, 5}


def test_the_groups_without_an_end():
    def ids(*tokens):
        return np.array(tokens, np.int32)

    groups = [
        PreferenceGroup(0, ids(2), (ids(7, 2), ids(2, 9))),
        PreferenceGroup(1, ids(5), (ids(7, 2), ids(8))),
        # The token before a response of one token is not of it.
        PreferenceGroup(2, ids(5, 2), (ids(8), ids(2))),
        PreferenceGroup(3, ids(5), (ids(2), ids(2), ids(2, 1, 1))),
        PreferenceGroup(4, ids(5), (ids(2), ids(1, 1, 2))),
    ]
    assert PreferenceDataset(groups).ending_without({2}).tolist() == [1, 2, 3]
    assert PreferenceDataset(groups).ending_without(set()).tolist() == [0, 1, 2, 3, 4]
