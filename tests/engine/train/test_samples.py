"""Answers before, while and after a run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from engine.config.load import to_dict
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.report import write_report
from engine.run_folder import read_samples
from engine.train import run as run_module
from engine.train import samples as samples_module
from engine.train.loop import train
from engine.train.measures import with_text
from engine.train.resume import check_same_run, config_values
from engine.train.samples import distinct_prompts
from engine.train.trackers import JsonlTracker
from tests.engine.distributed.launch import run_jobs

OPTIONS = {"sample_steps": 2, "sample_prompts": 2, "sample_max_new_tokens": 5, "save_steps": 3}


def sampling(make_config, pairs_jsonl, folder, **options):
    train = {"output_dir": str(folder), **OPTIONS, **options}
    return make_config(data={"eval_dataset_name": str(pairs_jsonl)}, optim={"learning_rate": 0.05}, train=train)


def test_a_run_draws_before_while_and_after(make_config, pairs_jsonl, tmp_path, monkeypatch):
    train(sampling(make_config, pairs_jsonl, tmp_path / "plain", sample_steps=None))
    shown = []
    monkeypatch.setattr(JsonlTracker, "show", lambda tracker, step, samples: shown.append((step, len(samples))))
    train(sampling(make_config, pairs_jsonl, tmp_path / "run"))
    samples = read_samples(tmp_path / "run")
    # Each time those of all steps so far.
    assert shown == [(0, 2), (2, 4), (4, 6)]
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2, 4, 4]
    assert len({sample["row"] for sample in samples}) == 2
    assert len({sample["prompt"] for sample in samples}) == 2
    assert samples[0]["sampled"] != samples[-2]["sampled"] or samples[1]["sampled"] != samples[-1]["sampled"]
    page = write_report(tmp_path / "run").read_text()
    assert "Answers to held-out prompts" in page
    assert page.count("step 2</h4>") == 2
    # What is learned does not depend on them.
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "run")]
    assert weights[0] == weights[1]


def test_a_resumed_run_has_the_samples_of_one_that_was_not_cut(make_config, pairs_jsonl, tmp_path, monkeypatch):
    train(sampling(make_config, pairs_jsonl, tmp_path / "whole"))
    cut, calls = sampling(make_config, pairs_jsonl, tmp_path / "cut"), []
    draw = run_module.draw_samples

    def die(*arguments, step, **options):
        calls.append(step)
        if step == 4:
            raise RuntimeError("killed")
        return draw(*arguments, step=step, **options)

    monkeypatch.setattr(run_module, "draw_samples", die)
    with pytest.raises(RuntimeError, match="killed"):
        train(cut)
    monkeypatch.undo()
    (tmp_path / "cut" / "samples.jsonl").open("a").write(json.dumps({"step": 4, "row": 0}) + "\n")
    train(cut, resume=True)
    assert read_samples(tmp_path / "cut") == read_samples(tmp_path / "whole")


def test_processes_that_share_a_model_draw_what_one_draws(make_config, pairs_jsonl, tmp_path):
    """Weights are gathered for each token; all processes end together."""
    options = {"max_steps": 2, "sample_steps": 1, "save_steps": None, "sample_max_new_tokens": 6}
    runs = [sampling(make_config, pairs_jsonl, tmp_path / name, **options) for name in ("alone", "together", "silent")]
    silent = replace(runs[2], train=replace(runs[2].train, sample_steps=None))
    jobs = [{"kind": "train", "config": to_dict(config), "resume": False} for config in (runs[1], silent)]
    ended = run_jobs(tmp_path, 2, jobs)
    assert [end.code for end in ended] == [0, 0], ended[0].err + ended[1].err
    train(runs[0])
    alone, together = (read_samples(tmp_path / name) for name in ("alone", "together"))
    assert [sample["step"] for sample in together] == [0, 0, 1, 1, 2, 2]
    assert together[:2] == alone[:2]
    # What is learned does not depend on them.
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("together", "silent")]
    assert all((models[0][key] == value).all() for key, value in models[1].items())


def test_a_resumed_run_may_draw_other_samples(make_config, pairs_jsonl, tmp_path):
    before = sampling(make_config, pairs_jsonl, tmp_path)
    changed = {"sample_prompts": 3, "sample_max_new_tokens": 9, "sample_temperature": 0.5}
    for options in (changed, {"sample_steps": None}):
        check_same_run(config_values(before), sampling(make_config, pairs_jsonl, tmp_path, **options), tmp_path)


def test_rows_of_a_mixture_are_named_with_their_set(make_config, tiny_tokenizer, monkeypatch):
    """Sets number their rows alike."""
    ids = [np.array([place], np.int32) for place in range(5, 8)]
    dataset = PreferenceDataset(PreferenceGroup(3, ids[n], (ids[2], ids[0]), source="ab"[n]) for n in range(2))
    monkeypatch.setattr(samples_module, "generate", lambda policy, prompts, **options: ids[: len(prompts)])
    drawn = samples_module.draw_samples(None, tiny_tokenizer, make_config(), dataset, step=0)
    details = {"eval": {"most_displaced": [{"group": 1}]}}
    with_text(details, {"eval": dataset}, tiny_tokenizer)
    rows = [record["row"] for record in (*drawn, *details["eval"]["most_displaced"])]
    assert rows == ["3 of a", "3 of b", "3 of b"]


def test_samples_need_held_out_prompts(make_config, tmp_path):
    with pytest.raises(UserError, match="answers held-out prompts: set data"):
        train(make_config(train={"output_dir": str(tmp_path / "run"), **OPTIONS}))


def test_prompts_are_the_first_that_differ(make_config, tiny_tokenizer, pairs_jsonl):
    from engine.data import load_dataset_groups

    dataset, _ = load_dataset_groups(make_config().data, tiny_tokenizer, split="train")
    twice = [dataset[0], dataset[0], dataset[1], dataset[2]]
    assert [group.row for group in distinct_prompts(twice, 2)] == [0, 1]
    assert len(distinct_prompts(twice, 9)) == 3
