"""Mixtures: what an epoch takes of each set, sets of different layouts, and what is said of each."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from engine.check import check
from engine.config import build_config
from engine.config.mixture import labels_of
from engine.config.schema import DataConfig, DatasetConfig
from engine.data import check_files, load_dataset_groups
from engine.data.mixture import Mixture, counts_of
from engine.data.sets import sets_of
from engine.errors import UserError

TEXT = [{"prompt": f"Where is lake {i}?", "chosen": f" In {i}.", "rejected": " No."} for i in range(10)]
ALPACA = [{"instruction": f"Name {i}", "input": "", "chosen": f"It is {i}", "rejected": "It is not"} for i in range(6)]
ASKED = [{"ask": [{"role": "user", "content": f"Why {i}?"}], "good": "So.", "bad": "No."} for i in range(4)]
"""Its answers are text beside messages, and its columns have names of their own."""


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def sets(write):
    """Three sets of different layouts."""
    for row in ASKED:
        row |= {
            key: [{"role": "assistant", "content": row[key]}] for key in ("good", "bad") if isinstance(row[key], str)
        }
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    return [
        {"name": write("lakes.jsonl", TEXT), "fraction": 0.5},
        {"name": write("names.jsonl", ALPACA), "rows": 9},
        {"name": write("whys.jsonl", ASKED), "fraction": 1.0, "columns": columns, "system": "Be brief."},
    ]


def sets_named(*amounts):
    return [DatasetConfig(name=f"set{i}", **amount) for i, amount in enumerate(amounts)]


@pytest.mark.parametrize(
    ("amounts", "sizes", "counts"),
    [
        ([{"fraction": 0.25}, {"fraction": 2.0}, {"rows": 7}], [100, 3, 5], (25, 6, 7)),
        ([{"weight": 3}, {"weight": 1}], [100, 20], (90, 30)),
        ([{"weight": 100}, {"weight": 20}], [100, 20], (100, 20)),
        ([{"weight": 1}, {"weight": 1}, {"weight": 1}], [3, 4, 4], (4, 4, 3)),
        ([{"weight": 1e-9}, {"weight": 1}], [10, 10], (1, 20)),
        ([{"fraction": 1e-9}], [10], (1,)),
    ],
)
def test_an_epoch_takes_of_each_set_what_is_asked_for(amounts, sizes, counts):
    assert counts_of(sets_named(*amounts), sizes) == counts


def test_epochs_take_new_groups_until_a_set_has_come_round():
    mixture = Mixture((10, 4, 3), (4, 4, 8))
    epochs = [mixture.draw(7, epoch) for epoch in range(5)]
    assert all(len(epoch) == mixture.per_epoch == 16 for epoch in epochs)
    of_first = np.stack([epoch[:4] for epoch in epochs])
    assert all(len(set(groups)) == 4 for groups in of_first.tolist())
    # Twenty draws of ten groups: each comes exactly twice, and in no two epochs after another.
    assert np.bincount(of_first.ravel()).tolist() == [2] * 10
    assert all(not set(a) & set(b) for a, b in zip(of_first[:2].tolist(), of_first[1:3].tolist(), strict=True))
    assert [epoch[4:8].tolist() for epoch in epochs] == [[10, 11, 12, 13]] * 5
    # Eight of three groups: each twice, and two of them a third time, which differ from epoch to epoch.
    times = [np.bincount(epoch[8:] - 14).tolist() for epoch in epochs]
    assert all(sorted(counts) == [2, 3, 3] for counts in times)
    assert times[0] != times[1]
    assert np.bincount(np.concatenate([epoch[8:] - 14 for epoch in epochs[:3]])).tolist() == [8, 8, 8]


def test_an_epoch_depends_on_its_seed_and_number_alone():
    mixture = Mixture((50, 20), (10, 5))
    assert mixture.draw(1, 3).tolist() == mixture.draw(1, 3).tolist()
    assert mixture.draw(1, 3).tolist() != mixture.draw(2, 3).tolist()
    # Another set before it does not change what is drawn of a set that has its place.
    assert mixture.draw(1, 3)[:10].tolist() == Mixture((50, 9), (10, 9)).draw(1, 3)[:10].tolist()
    # Epochs far away: the same set of groups as all of them.
    used = mixture.used(1, 2)
    assert used.tolist() == sorted({*mixture.draw(1, 0).tolist(), *mixture.draw(1, 1).tolist()})
    assert mixture.used(1, 10**6).tolist() == list(range(70))


def test_sets_of_different_layouts_are_read_as_alone(sets, tiny_tokenizer):
    data = DataConfig(datasets=tuple(DatasetConfig(**one) for one in sets))
    dataset, report = load_dataset_groups(data, tiny_tokenizer, split="train")
    assert dataset.source_names == ("lakes", "names", "whys")
    assert {label: part.layout for label, part in report.parts.items()} == {
        "lakes": "preference",
        "names": "alpaca",
        "whys": "conversation",
    }
    assert (report.total, report.kept, dataset.mixture) == (20, 20, Mixture((10, 6, 4), (5, 9, 4)))
    assert dataset[12].label == "2 of names"
    alone = [
        load_dataset_groups(
            DataConfig(dataset_name=one["name"], columns=one.get("columns"), system=one.get("system")),
            tiny_tokenizer,
            split="train",
        )[0]
        for one in sets
    ]
    expected = [group for part in alone for group in part]
    assert [(g.row, g.prompt_ids.tolist()) for g in dataset] == [(g.row, g.prompt_ids.tolist()) for g in expected]
    assert "Be brief." in tiny_tokenizer.decode(dataset[19].prompt_ids)
    part = dataset.only(dataset.mixture.used(3, 1))
    assert len(part) == 5 + 6 + 4
    assert part.digest == dataset.digest
    rows = [(part[i].label, part[i].prompt_ids.tolist()) for i in part.epoch(3, 0)]
    assert rows == [(dataset[i].label, dataset[i].prompt_ids.tolist()) for i in dataset.epoch(3, 0)]


def test_the_digest_knows_how_much_an_epoch_takes(sets, tiny_tokenizer):
    digests = set()
    for rows in (9, 8):
        sets[1]["rows"] = rows
        data = DataConfig(datasets=tuple(DatasetConfig(**one) for one in sets))
        digests.add(load_dataset_groups(data, tiny_tokenizer, split="train")[0].digest)
    assert len(digests) == 2


def config_of(sets, model="m", **data):
    return build_config({"model": {"model_name_or_path": str(model)}, "data": {"datasets": sets, **data}}, "test")


def test_check_says_what_it_finds_by_set(sets, write, tiny_model_dir):
    write("names.jsonl", [*ALPACA, ALPACA[0], {**ALPACA[1], "chosen": ""}])
    write("lakes.jsonl", [*TEXT, {"prompt": "Q", "chosen": " a"}])
    sets.append({"name": write("more/lakes.jsonl", TEXT[:2]), "label": "again", "rows": 1})
    found = check(config_of(sets, tiny_model_dir))
    assert {name: report.counts for name, report in found.reports.items()} == {
        "train: lakes": {"missing_column": 1},
        "train: names": {"empty_completion": 1, "duplicate": 1},
        "train: whys": {},
        # Rows of a set that an earlier set has.
        "train: again": {"duplicate": 2},
    }
    assert len(found.obstacles) == 1
    assert found.obstacles[0].startswith("lakes (")
    assert "an epoch takes 19 rows" in found.text
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in found.text.splitlines() if "of the epoch" in line}
    assert lines["names"] == "9 of 8 rows, 47.4% of the epoch, each 1.12 times"
    assert lines["lakes"] == "5 of 10 rows, 26.3% of the epoch"


@pytest.mark.parametrize("given", ["eval_split", "eval_fraction", "eval_dataset_name"])
def test_evaluation_data(given, write, tiny_tokenizer):
    write("a/train.jsonl", TEXT)
    name = write("a/test.jsonl", [{**row, "prompt": f"Is {row['prompt']}"} for row in TEXT[:3]])
    sets = [{"name": name.removesuffix("/test.jsonl"), "fraction": 1.0}, {"name": write("b.jsonl", ALPACA), "rows": 3}]
    if given == "eval_split":
        sets[0]["eval_split"] = "test[:2]"
    data = config_of(sets, **({} if given == "eval_split" else {given: 0.4 if given == "eval_fraction" else name})).data
    assert data.has_evaluation
    check_files(data)
    dataset, _ = load_dataset_groups(data, tiny_tokenizer, split="eval")
    expected = {"eval_split": (2, ("a",)), "eval_dataset_name": (3, ())}
    if given == "eval_fraction":
        assert dataset.source_names == ("a", "b")
        assert 0 < len(dataset) < 16
        train, _ = load_dataset_groups(data, tiny_tokenizer, split="train")
        assert len(train) + len(dataset) == 16
    else:
        assert (len(dataset), dataset.source_names) == expected[given]
    assert dataset.mixture is None


@pytest.mark.parametrize("how", ["file", "pattern", "data_files"])
def test_what_is_read_whole_is_not_evaluated_under_the_name_of_a_split(how, write, tmp_path):
    """It would be the training data."""
    file, pattern = write("a/train.jsonl", TEXT), str(tmp_path / "a" / "*.jsonl")
    one = {"file": {"name": file}, "pattern": {"name": pattern}, "data_files": {"name": str(tmp_path / "a")}}[how]
    one |= {"data_files": ["train.jsonl"]} if how == "data_files" else {}
    with pytest.raises(UserError, match=r"eval_split test is of files that are read whole, without splits: give slic"):
        check_files(config_of([{**one, "rows": 3, "eval_split": "test"}]).data)
    check_files(config_of([{**one, "rows": 3, "split": "train[:8]", "eval_split": "train[8:]"}]).data)
    if how != "data_files":
        with pytest.raises(UserError, match=r"there is no evaluation data: data.dataset_name=.* is read whole"):
            sets_of(DataConfig(dataset_name=one["name"]), "eval")


def test_a_small_set_may_hold_out_nothing(write, tiny_model_dir, tiny_tokenizer):
    sets = [{"name": write("a.jsonl", TEXT), "fraction": 1.0}, {"name": write("b.jsonl", ALPACA[:1]), "rows": 3}]
    config = config_of(sets, tiny_model_dir, eval_fraction=0.3)
    dataset, report = load_dataset_groups(config.data, tiny_tokenizer, split="eval")
    assert dataset.source_names == ("a",)
    assert report.parts["b"].total == 0
    assert not check(config).obstacles
    none = config_of(sets, tiny_model_dir, eval_fraction=1e-9)
    with pytest.raises(UserError, match=r"a .*: data.eval_fraction leaves this split none of 10 rows"):
        load_dataset_groups(none.data, tiny_tokenizer, split="eval")


@pytest.mark.parametrize(
    ("sets", "data", "message"),
    [
        ([{"name": "a"}], {}, "needs one of weight, fraction and rows for each set; a has none"),
        ([{"name": "a", "rows": 1, "weight": 1}], {}, "a has weight and rows"),
        ([{"name": "a", "rows": 0}], {}, r"data\.datasets\.0\.rows must be positive, got 0"),
        ([{"name": "a", "weight": 1}, {"name": "b", "rows": 1}], {}, "give every set a weight, or none"),
        ([{"name": "a", "rows": 1}], {"dataset_name": "b"}, "leave data.dataset_name out"),
        ([{"name": "a", "rows": 1}], {"dataset_config": "b"}, "each set of data.datasets has config and split"),
        ([{"name": "a", "rows": 1, "eval_split": "x"}], {"eval_fraction": 0.1}, "leave data.eval_fraction out"),
        ([{"name": "a/x", "rows": 1}, {"name": "b/x", "rows": 1}], {}, "two sets are called x; give each a label"),
        ([{"name": "a", "rows": 1, "label": "a/b"}], {}, "write letters, digits"),
        ([{"name": "a", "rows": 1, "columns": {"x": "y"}}], {}, r"data\.datasets\.0\.columns has no part x"),
        ([{"name": "a", "rows": 1, "wieght": 1}], {}, r"data\.datasets\.0\.wieght: unknown key; .*datasets\.0\.weight"),
        ([{"rows": 1}], {}, r"data\.datasets\.0\.name is missing"),
        ([{"name": "a", "rows": 1.5}], {}, r"data\.datasets\.0\.rows: expected an integer"),
        (["a"], {}, "expected a list of mappings with name"),
    ],
)
def test_settings_that_cannot_be_are_refused(sets, data, message):
    with pytest.raises(UserError, match=message):
        config_of(sets, **data)


def test_two_splits_of_one_set_have_names_of_their_own():
    data = config_of([{"name": "o/x", "config": "c", "split": s, "rows": 1} for s in ("a", "b[:3]")]).data
    assert data.names == ("o/x",)
    assert labels_of(data.datasets) == ["x-a", "x-b-3"]


def test_files_of_a_set(write, tiny_tokenizer):
    folder = write("d/one.jsonl", TEXT[:2]).removesuffix("/one.jsonl")
    write("d/two.jsonl", TEXT[2:5])
    write("d/three.jsonl", TEXT[5:])

    def rows(**one):
        data = DataConfig(datasets=(DatasetConfig(fraction=1.0, **one),))
        return [g.row for g in load_dataset_groups(data, tiny_tokenizer, split="train")[0]]

    assert rows(name=folder, data_files=("two.jsonl", "o*.jsonl")) == list(range(5))
    with pytest.raises(UserError, match=r"data_files are below a folder.*data\.datasets: one: name=.*is a file"):
        rows(name=f"{folder}/one.jsonl", data_files=("x",))
    with pytest.raises(UserError, match=r"data\.datasets: gone: name=.*gone\.jsonl does not exist"):
        rows(name=f"{folder}/gone.jsonl")


def test_a_set_without_rows_stops(write, tiny_tokenizer):
    data = config_of([{"name": write("a.jsonl", TEXT), "rows": 1}, {"name": write("b.jsonl", TEXT), "rows": 1}]).data
    write("b.jsonl", [{**TEXT[0], "prompt": "long " * 2000}])
    with pytest.raises(UserError, match=r"b \(.*b\.jsonl\): none of 1 rows can be used"):
        load_dataset_groups(data, tiny_tokenizer, split="train")


def test_the_page_explains_every_key_of_a_set():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    section = page.partition("## Mixtures")[2].partition("\n## ")[0]
    named = {name for line in section.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    assert {field.name for field in fields(DatasetConfig)} <= named
