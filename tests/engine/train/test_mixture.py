"""Runs on a mixture: metrics by set, resumption to the bit, references of what is drawn alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from engine.cli import main
from engine.config import load_config, to_yaml
from engine.data import load_dataset_groups
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.model import load_tokenizer
from engine.precompute import check_settings, fill_store
from engine.report import write_report
from engine.run_folder import EVAL_SOURCE, TRAIN_SOURCE, of_sources
from engine.train.feed import TrainingFeed, drawn_groups
from engine.train.loop import train
from tests.engine.train.test_feed import FLOPS
from tests.engine.train.test_resume import run_files

NAMES = [{"instruction": f"Name {i}", "input": "", "chosen": f"It is {i} or so", "rejected": "No"} for i in range(12)]
TESTED = [{"instruction": f"Say {i}", "input": "", "chosen": f"I say {i}", "rejected": "I do not"} for i in range(5)]


@pytest.fixture
def mixed(make_config, pairs_jsonl, tmp_path):
    """``mixed(**sections)``: 8 of 24 text pairs and 6 of 12 alpaca rows an epoch, three steps of six pairs."""
    folder = tmp_path / "names"
    folder.mkdir()
    for name, rows in (("train", NAMES), ("test", TESTED)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [
        {"name": str(pairs_jsonl), "rows": 8, "eval_split": "train[:7]"},
        {"name": str(folder), "fraction": 0.5, "eval_split": "test"},
    ]

    def mixed(*, evaluated=True, **sections):
        kept = sets if evaluated else [{k: v for k, v in one.items() if k != "eval_split"} for one in sets]
        data = {"dataset_name": None, "datasets": kept, **sections.pop("data", {})}
        return make_config(data=data, **sections)

    return mixed


def test_a_run_says_what_it_learns_of_each_set(mixed, rows_of, tmp_path, caplog):
    caplog.set_level("INFO")
    config = mixed(train={"num_train_epochs": 3, "logging_steps": 2, "output_dir": str(tmp_path / "run")})
    result = train(config)
    assert result.steps == 9
    seen = {}
    for row in rows_of(config):
        parts = of_sources(TRAIN_SOURCE, row)
        assert set(parts) == {"pairs", "names"}
        counts = {name: part["num_pairs"] for name, part in parts.items()}
        for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
            # Steps differ in size, and the row is a mean over steps: here only the last of an epoch is smaller.
            assert min(p[name] for p in parts.values()) - 1 <= row[name] <= max(p[name] for p in parts.values()) + 1
        seen = {name: seen.get(name, 0) + count for name, count in counts.items()}
    assert seen == {"pairs": 24, "names": 18}
    values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    parts = of_sources(EVAL_SOURCE, values)
    assert {name: part["num_pairs"] for name, part in parts.items()} == {"pairs": 7, "names": 5}
    for name in ("loss", "rewards/margins", "logps/rejected", "ranking_accuracy"):
        whole = sum(part[name] * part["num_pairs"] for part in parts.values()) / 12
        assert values[f"eval_{name}"] == pytest.approx(whole, rel=1e-6)
    assert evaluate(config, str(tmp_path / "run")) == pytest.approx(values, rel=1e-5)
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert {name: part["total"] for name, part in data["lint"]["sources"].items()} == {"pairs": 24, "names": 12}
    assert (data["plan"]["groups"], data["plan"]["steps_per_epoch"]) == (14, 3)
    page = write_report(tmp_path / "run").read_text()
    assert "Sets of the mixture" in page
    assert "2 sets, " in page
    assert "step 9 of 9" in page
    # In training and held-out, lint by set, and the configuration.
    assert page.count("<td>names</td>") == 2
    assert "names (" in page
    card = (tmp_path / "run" / "README.md").read_text()
    assert "after preference training on a mixture of `" in card
    assert "eval/names/loss" in card
    assert "in 2 sets, 14 rows an epoch" in caplog.text


def test_one_pair_a_step_adds_up_to_its_set(mixed, rows_of):
    config = mixed(packing={"pairs_per_step": 1}, train={"max_steps": 10})
    train(config)
    for row in rows_of(config):
        ((_, part),) = [(n, p) for n, p in of_sources(TRAIN_SOURCE, row).items() if p["num_pairs"]]
        assert part == pytest.approx({name: 1.0 if name == "num_pairs" else row[name] for name in part}, rel=1e-5)


@pytest.mark.parametrize("loss", [{}, {"loss_type": "aot"}])
def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(mixed, tmp_path, loss):
    def config(name):
        run = {"num_train_epochs": 2, "save_steps": 2, "logging_steps": 4, "output_dir": str(tmp_path / name)}
        return mixed(loss=loss, train=run)

    train(config("whole"))
    # In the middle of a logging interval, and of the second epoch.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-6", "model.safetensors", "complete.json"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    result = train(config("cut"), resume=True)
    assert result.resumed_from in (2, 4)
    assert run_files(tmp_path / "cut") == run_files(tmp_path / "whole")


def test_a_finished_run_goes_on_in_the_next_epoch(mixed, tmp_path):
    """Its data is the same, though it holds more of it now."""

    def config(name, epochs):
        run = {"num_train_epochs": epochs, "output_dir": str(tmp_path / name)}
        return mixed(evaluated=False, optim={"lr_scheduler_type": "constant"}, train=run)

    train(config("whole", 2))
    train(config("longer", 1))
    assert train(config("longer", 2), resume=True).resumed_from == 3
    assert run_files(tmp_path / "longer") == run_files(tmp_path / "whole")


def test_another_mixture_does_not_go_on(mixed):
    train(mixed(train={"max_steps": 2, "save_steps": 1}))
    other = mixed(train={"max_steps": 4, "save_steps": 1})
    object.__setattr__(other.data.datasets[0], "rows", 9)
    with pytest.raises(UserError, match=r"the training data is not what it was \(data\.datasets was "):
        train(other, resume=True)


def test_references_are_of_what_is_drawn_and_are_found_again(mixed, tmp_path, capsys):
    store = {"store": str(tmp_path / "store")}

    def computed(**sections):
        config = mixed(evaluated=False, reference=store, **sections)
        check_settings(config, None)
        fill_store(config)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train: "))

    assert computed().startswith("train: 14 rows computed, 0 reused")
    # The second epoch draws as many others of each set.
    assert computed(train={"num_train_epochs": 2}).startswith("train: 14 rows computed, 14 reused")
    # By content: as a set alone.
    alone = {"dataset_name": str(tmp_path / "names"), "datasets": []}
    assert computed(data=alone).startswith("train: 12 rows reused")


def test_the_plan_names_the_sets(mixed, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(mixed()))
    assert load_config(path) == mixed()
    assert main(["plan", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["preference", "groups", "14", "28", "responses"] in lines
    assert ["names", "6", "an", "epoch,", "of", "12:", "0.50", "times", "each"] in lines


def test_an_exported_mixture_trains_as_its_sets_do(mixed, tmp_path):
    """Each set into a file of its own, whole, so that an epoch takes the same rows of it."""
    config = mixed(evaluated=False)
    check_settings(config, tmp_path / "out.jsonl")
    fill_store(config, tmp_path / "out.jsonl")
    files = {name: tmp_path / f"out-{name}.jsonl" for name in ("pairs", "names")}
    written = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    assert {name: len(rows) for name, rows in written.items()} == {"pairs": 24, "names": 12}
    assert all(row["ref_chosen_logps"] < 0 > row["ref_rejected_logps"] for rows in written.values() for row in rows)
    amounts = {"pairs": {"rows": 8}, "names": {"fraction": 0.5}}
    sets = [{"name": str(file), "label": name, **amounts[name]} for name, file in files.items()]
    before, after = (
        train(mixed(evaluated=False, data=data, train={"output_dir": str(tmp_path / f"run{i}")})).metrics
        for i, data in enumerate(({}, {"datasets": sets}))
    )
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert after[name] == pytest.approx(before[name], rel=1e-6)


def test_rows_of_each_step_are_of_the_epoch(mixed, tmp_path):
    """Over two epochs, every alpaca row once, and sixteen of the pairs."""
    config = mixed(train={"num_train_epochs": 2})
    dataset = drawn_groups(config, load_dataset_groups(config.data, load_tokenizer(config.model), split="train")[0])
    assert len(dataset) == 28
    feed = TrainingFeed(dataset, config.packing, config.train, lookup=None, flops=FLOPS, device=torch.device("cpu"))
    steps = [feed.build(n) for n in range(1, feed.total_steps + 1)]
    rows = [row for step in steps for row in step.rows]
    assert len(rows) == len(set(rows)) == 28
    assert sorted(r for r in rows if r.endswith("names")) == sorted(f"{i} of names" for i in range(12))
    for step in steps:
        assert [dataset.source_names[s] for s in step.sources] == [row.split(" of ")[1] for row in step.rows]
    assert np.concatenate([step.sources for step in steps]).sum() == 12
