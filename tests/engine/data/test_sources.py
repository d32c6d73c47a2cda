"""Files, folders, splits, slices and Hub names."""

from __future__ import annotations

import json

import pytest

from engine.data.sources import open_source
from engine.errors import UserError


def write_rows(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"v": v}) + "\n" for v in values))


def values(source):
    return [row.data["v"] for row in source]


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "train-00001-of-00002.jsonl", [3, 4])
    write_rows(tmp_path / "train-00000-of-00002.jsonl", [1, 2])
    write_rows(tmp_path / "test" / "part.jsonl", [5])
    write_rows(tmp_path / "my_validation.jsonl", [6])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    write_rows(tmp_path / ".cache" / "train.jsonl", [99])
    return tmp_path


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [1, 2, 3, 4]),
        ("test", [5]),
        ("eval", [5]),
        ("validation", [6]),
        ("dev", [6]),
        ("train[1:3]", [2, 3]),
        ("train[:2]", [1, 2]),
        ("train[3:]", [4]),
        ("train[-1:]", [4]),
        ("train[50%:]", [3, 4]),
        ("train[:25%]", [1]),
        ("train[3:1]", []),
        ("train[-1:1]", []),
    ],
)
def test_splits_and_slices_of_a_folder(folder, split, expected):
    source = open_source(str(folder), split=split)
    assert values(source) == expected
    assert values(source) == expected, "a source can be iterated again"


def test_rows_know_file_index_and_line(folder):
    row = next(iter(open_source(str(folder), split="train[2:]")))
    assert (row.index, row.line) == (2, 1)
    assert row.where == f"{folder / 'train-00001-of-00002.jsonl'}, row 2 (line 1)"


def test_files_without_a_split_name_are_train(tmp_path):
    write_rows(tmp_path / "b.jsonl", [2])
    write_rows(tmp_path / "a.jsonl", [1])
    assert values(open_source(str(tmp_path))) == [1, 2]
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        open_source(str(tmp_path), split="test")


def test_single_file_is_every_split(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [1, 2, 3])
    assert values(open_source(str(tmp_path / "rows.jsonl"), split="test", max_rows=2)) == [1, 2]


def test_folder_saved_by_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"v": [1, 2, 3]})
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert values(open_source(str(tmp_path / "one"), split="train[1:]")) == [2, 3]
    assert values(open_source(str(tmp_path / "two"), split="test")) == [2]
    with pytest.raises(UserError, match="no split 'dev'; it has test, train"):
        open_source(str(tmp_path / "two"), split="dev")


def test_hub_name_is_loaded_through_datasets(monkeypatch, tmp_path):
    import datasets

    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_dict({"v": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    source = open_source("org/name", split="train[1:]", config="default")
    assert values(source) == [2, 3]
    assert calls == [("org/name", "default", "train")]
    assert next(iter(source)).where == "org/name, row 1"


def test_hub_name_offline_is_a_user_error(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"dataset nobody/nothing-here, split train: .*while online"):
        open_source("nobody/nothing-here")


def test_a_hub_name_without_a_connection_is_answered_by_the_cache_at_once(monkeypatch, tmp_path):
    import datasets

    def load_dataset(name, config, *, split):
        assert datasets.config.HF_HUB_OFFLINE
        if name == "not/cached":
            raise ConnectionError("Couldn't reach the Hugging Face Hub")
        return datasets.Dataset.from_dict({"v": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("engine.data.sources.unreachable", lambda endpoint: "Network is unreachable")
    monkeypatch.chdir(tmp_path)
    assert values(open_source("is/cached")) == [1, 2, 3]
    with pytest.raises(UserError, match=r"not/cached, split train: .*not in the cache.*unreachable; check the path"):
        open_source("not/cached")
    assert not datasets.config.HF_HUB_OFFLINE


def test_hub_split_errors_are_passed_on(monkeypatch, tmp_path):
    import datasets

    def load_dataset(name, config, *, split):
        raise ValueError('Unknown split "x". Should be one of ["train"].\nmore')

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'split x does not load: Unknown split "x"\. Should be one of \["train"\]\.$'):
        open_source("org/name", split="x")


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/no/such/folder", "~/no-such-folder-here", "a/b/c"])
def test_missing_path_is_not_taken_for_a_hub_name(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        open_source(name)


def test_other_faults(tmp_path):
    with pytest.raises(UserError, match="holds no data files"):
        open_source(str(tmp_path))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(UserError, match=r"rows\.txt: unknown kind of data file"):
        open_source(str(tmp_path / "rows.txt"))
    write_rows(tmp_path / "rows.jsonl", [1])
    with pytest.raises(UserError, match="split 'train\\+test' is not understood"):
        open_source(str(tmp_path / "rows.jsonl"), split="train+test")
    with pytest.raises(UserError, match=r"data\.dataset_config=x is for Hub datasets"):
        open_source(str(tmp_path / "rows.jsonl"), config="x")


def test_shards_are_the_split_that_they_are_named_after(tmp_path):
    for number, name in enumerate(("train_prefs", "train_sft", "test_prefs")):
        write_rows(tmp_path / "data" / f"{name}-00000-of-00001.jsonl", [number])
    assert values(open_source(str(tmp_path), split="train_prefs")) == [0]
    assert values(open_source(str(tmp_path), split="test_prefs[:1]")) == [2]
    with pytest.raises(UserError, match="no split 'train'; it has test_prefs, train_prefs, train_sft"):
        open_source(str(tmp_path))


def test_splits_are_those_that_datasets_finds(tmp_path):
    data_files = pytest.importorskip("datasets.data_files")
    names = ("data/train_prefs-00000-of-00002.jsonl", "data/train_prefs-00001-of-00002.jsonl",
             "data/other-00000-of-00001.jsonl")  # fmt: skip
    worded = ("train.jsonl", "sub/my_test_rows.jsonl", "val-1.jsonl")
    folders = ("train/a.jsonl", "my-dev/a.jsonl", "b/test_2/c.jsonl")
    for folder, files in (
        ("sharded", names),
        ("worded", worded),
        ("folders", folders),
        ("plain", ("a.jsonl", "b/c.jsonl")),
    ):
        for number, name in enumerate(files):
            write_rows(tmp_path / folder / name, [number])
        patterns = data_files.get_data_patterns(str(tmp_path / folder))
        found = data_files.DataFilesDict.from_patterns(patterns, base_path=str(tmp_path / folder))
        for split, paths in found.items():
            source = open_source(str(tmp_path / folder), split=str(split))
            assert {row.file for row in source} == set(paths), split


README = """---
configs:
- config_name: clean
  default: true
  data_files:
  - split: train
    path: [rows/a.jsonl, "rows/b*.jsonl"]
  - {split: held, path: c.jsonl}
- config_name: raw
  data_files: "rows/*.jsonl"
---
# Rows
"""


def test_configurations_of_a_folder(tmp_path):
    for name, number in (("rows/a", 1), ("rows/b1", 2), ("rows/x", 3), ("c", 4)):
        write_rows(tmp_path / f"{name}.jsonl", [number])
    (tmp_path / "README.md").write_text(README)
    assert values(open_source(str(tmp_path))) == [1, 2]
    assert values(open_source(str(tmp_path), split="held")) == [4]
    assert values(open_source(str(tmp_path), config="raw")) == [1, 2, 3]
    assert values(open_source(str(tmp_path), config="raw", split="train[:67%]")) == [1, 2]
    with pytest.raises(UserError, match=r"no configuration 'odd'; set data\.dataset_config to one of clean, raw"):
        open_source(str(tmp_path), config="odd")
    (tmp_path / "README.md").write_text(README.replace("  default: true\n", ""))
    with pytest.raises(UserError, match=r"several configurations; set data\.dataset_config to one of clean, raw"):
        open_source(str(tmp_path))
    (tmp_path / "README.md").write_text("# Rows")
    assert values(open_source(str(tmp_path), config="rows")) == [1, 2, 3]
    with pytest.raises(UserError, match="neither such a folder nor configs"):
        open_source(str(tmp_path), config="odd")


def test_patterns(tmp_path, monkeypatch):
    for name, number in (("a/x", 1), ("a/y", 2), ("b", 3)):
        write_rows(tmp_path / f"{name}.jsonl", [number])
    monkeypatch.chdir(tmp_path)
    assert values(open_source("a/*.jsonl")) == [1, 2]
    assert values(open_source(f"{tmp_path}/**")) == [1, 2, 3]
    assert values(open_source("a/[y]*")) == [2]
    with pytest.raises(UserError, match=r"a/\*\.csv: no data file fits this pattern"):
        open_source("a/*.csv")


def test_an_unknown_split_of_a_file_is_refused(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [1])
    with pytest.raises(UserError, match="one file without splits, so it has no split 'train_prefs'; ask for train"):
        open_source(str(tmp_path / "rows.jsonl"), split="train_prefs")


def test_a_list_of_files_is_one_split_in_its_order(tmp_path):
    for name in ("a", "b", "c"):
        write_rows(tmp_path / f"{name}.jsonl", [name])
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    assert values(open_source((b, a))) == ["b", "a"]
    assert values(open_source((b, f"{tmp_path}/[ac].jsonl"), split="train[1:]")) == ["a", "c"]
    assert open_source((b, a)).name == f"{b} and 1 more"
    for wrong, message in (
        ((a, f"{tmp_path}/*.jsonl"), "a.jsonl is listed twice"),
        ((a, str(tmp_path)), "in a list is a folder; name its files"),
        ((a, "org/name"), r"org/name in a list is no file here; several sets of the Hub are a mixture"),
        ((a, f"{tmp_path}/gone.jsonl"), r"data\.dataset_name=.*gone\.jsonl does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(wrong)
    with pytest.raises(UserError, match="has no split 'x'"):
        open_source((a, b), split="x")
