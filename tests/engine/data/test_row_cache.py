"""Rows of an earlier start are those that would be made now, or they are made."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import build_config
from engine.config.schema import DataConfig
from engine.data import load_dataset_groups, read, row_cache
from engine.data.sets import sets_of
from engine.errors import UserError
from tests.engine.conftest import CHAT_TEMPLATE, build_tokenizer, preference_rows
from tests.engine.distributed.launch import launch

ROWS = 12
DATED = CHAT_TEMPLATE + "{{ strftime_now('%Y') }}"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows() -> list[dict]:
    found = preference_rows(ROWS)
    # A repeated row and a cut one are noted, and kept.
    return [*found, found[3], {**found[4], "chosen": found[4]["chosen"] * 40}]


@pytest.fixture
def data(tmp_path, rows) -> DataConfig:
    path = write(tmp_path / "pairs.jsonl", rows)
    return DataConfig(dataset_name=str(path), max_length=120, cache=str(tmp_path / "cache"))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The splits whose rows were tokenised."""
    found: list[str] = []
    inner = read.stream_set

    def noted(one, *arguments, **options):
        found.append(one.split)
        return inner(one, *arguments, **options)

    monkeypatch.setattr(read, "stream_set", noted)
    return found


def entries(data: DataConfig) -> list[Path]:
    return sorted(Path(data.cache).glob("*"))


def assert_equal(found, expected) -> None:
    (dataset, report), (other, other_report) = found, expected
    assert report.to_dict() == other_report.to_dict()
    assert dataset.digest == other.digest
    assert (dataset.source_names, dataset.mixture) == (other.source_names, other.mixture)
    for ours, theirs in zip(dataset, other, strict=True):
        for name in (field.name for field in fields(ours)):
            np.testing.assert_equal(getattr(ours, name), getattr(theirs, name))


def kinds(rows: list[dict]) -> dict[str, list[dict]]:
    ranked = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "c"], "ranking": [2, 1, 3]}
        for row in rows
    ]
    scored = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "c"], "scores": [2, 1, 3]}
        for row in rows
    ]
    return {
        "pairs": rows,
        "rankings": ranked,
        "scores": scored,
        "references": [{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -i} for i, row in enumerate(rows)],
        "numbers": [{**row, "weight": 0.5 + i, "margin": 0.25} for i, row in enumerate(rows)],
    }


@pytest.mark.parametrize("kind", ["pairs", "rankings", "scores", "references", "numbers", "masked"])
def test_what_is_read_is_what_was_made(kind, rows, data, tmp_path, tiny_tokenizer, made):
    if kind == "masked":
        data = replace(data, mask_pattern="[aeiou]+")
    else:
        write(tmp_path / "pairs.jsonl", kinds(rows)[kind])
    whole = load_dataset_groups(replace(data, cache="none"), tiny_tokenizer, split="train")
    first = load_dataset_groups(data, tiny_tokenizer, split="train")
    assert made == ["train", "train"]
    again = load_dataset_groups(data, tiny_tokenizer, split="train")
    assert made == ["train", "train"]
    for found in (first, again):
        assert_equal(found, whole)
        # Pages of the file, not memory of this process.
        assert not found[0]._tokens.flags.owndata
    assert again[0].lengths[2].tolist() == whole[0].lengths[2].tolist()


def test_sets_of_a_mixture_and_the_two_sides_of_a_split(rows, tmp_path, tiny_tokenizer, made):
    files = [write(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:7]), ("b", rows[7:]))]
    sets = [{"name": str(path), "rows": 5, "label": path.stem} for path in files]
    values = {"datasets": sets, "max_length": 120, "eval_fraction": 0.3}
    data = build_config({"model": {"model_name_or_path": "m"}, "data": values}, "test").data
    kept = replace(data, cache=str(tmp_path / "cache"))
    for split in ("train", "eval"):
        whole = load_dataset_groups(data, tiny_tokenizer, split=split)
        load_dataset_groups(kept, tiny_tokenizer, split=split)
        count = len(made)
        assert_equal(load_dataset_groups(kept, tiny_tokenizer, split=split), whole)
        assert len(made) == count
    # How much of a set an epoch takes changes no row.
    other = replace(kept, datasets=tuple(replace(one, rows=3) for one in kept.datasets))
    assert load_dataset_groups(other, tiny_tokenizer, split="train")[0].mixture.counts == (3, 3)
    assert len(made) == count


def test_strictness_holds_for_rows_that_were_kept(data, tiny_tokenizer, made):
    load_dataset_groups(data, tiny_tokenizer, split="train")
    with pytest.raises(UserError) as alone:
        load_dataset_groups(replace(data, strict=True, cache="none"), tiny_tokenizer, split="train")
    made.clear()
    with pytest.raises(UserError) as kept:
        load_dataset_groups(replace(data, strict=True), tiny_tokenizer, split="train")
    assert str(kept.value) == str(alone.value)
    assert made == []


def key_of(data: DataConfig, tokenizer, split: str = "train") -> str:
    found = row_cache._place(sets_of(data, split), data, tokenizer)
    assert found is not None
    return found[1]


def test_every_setting_of_the_data_is_a_part_of_the_key(data, tiny_tokenizer):
    before = key_of(data, tiny_tokenizer)
    files = [[Path(data.dataset_name)]]
    of_tokenizer = row_cache.tokenizer_digest(tiny_tokenizer)
    for field in fields(DataConfig):
        # Beside what a setting may be: the key does not ask.
        changed = copy.copy(data)
        object.__setattr__(changed, field.name, "auto" if field.name == "chat_template" else ("another", 1))
        (one,) = sets_of(data, "train")
        after = row_cache.row_key([replace(one, data=changed)], files, of_tokenizer)
        assert (after == before) == (field.name in row_cache._FREE or field.name == "chat_template"), field.name
    for change in ({"part": "train[:3]"}, {"name": "x"}, {"config": "x"}, {"files": ("x",)}, {"label": "x"}):
        (one,) = sets_of(data, "train")
        assert row_cache.row_key([replace(one, **change)], files, of_tokenizer) != before, change
    assert row_cache.row_key(sets_of(data, "train") * 2, files * 2, of_tokenizer) != before


def test_content_code_and_versions_are_parts_of_the_key(data, rows, tiny_tokenizer, monkeypatch):
    path = Path(data.dataset_name)
    keys = [key_of(data, tiny_tokenizer)]
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    # Neither size nor time tell.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keys.append(key_of(data, tiny_tokenizer))
    monkeypatch.setattr(row_cache, "_code_digest", lambda: "other code")
    keys.append(key_of(data, tiny_tokenizer))
    monkeypatch.setattr(row_cache, "_version", lambda package: "2" if package == "tokenizers" else "1")
    keys.append(key_of(data, tiny_tokenizer))
    assert len(set(keys)) == len(keys)


def test_all_that_a_tokenizer_is_is_a_part_of_the_key(data, tiny_tokenizer, tmp_path):
    def changed(change) -> str:
        tokenizer = build_tokenizer(chat_template=CHAT_TEMPLATE)
        change(tokenizer)
        return key_of(data, tokenizer)

    def nothing(tokenizer) -> None: ...

    def other_template(tokenizer) -> None:
        tokenizer.chat_template += " "

    def more_tokens(tokenizer) -> None:
        tokenizer.add_tokens(["zzz"])

    def more_special_tokens(tokenizer) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<zzz>"]})

    def other_end(tokenizer) -> None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)

    def no_normalizer(tokenizer) -> None:
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    changes = (nothing, other_template, more_tokens, more_special_tokens, other_end, no_normalizer)
    assert changed(nothing) == changed(nothing)
    assert len({changed(change) for change in changes}) == len(changes)


def test_a_template_file_is_known_by_its_text_and_a_date_must_be_pinned(data, tmp_path):
    tokenizer = build_tokenizer(chat_template=None)
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT_TEMPLATE)
    data = replace(data, chat_template=str(path))
    first = key_of(data, tokenizer)
    path.write_text(DATED)
    assert row_cache._place(sets_of(data, "train"), data, tokenizer) is None
    days = {key_of(replace(data, template_date=day), tokenizer) for day in ("2026-11-25", "2026-11-26")}
    assert len(days | {first}) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_made_again(damage, data, tiny_tokenizer, made, caplog):
    whole = load_dataset_groups(replace(data, cache="none"), tiny_tokenizer, split="train")
    load_dataset_groups(data, tiny_tokenizer, split="train")
    (path,) = entries(data)
    good = path.read_bytes()
    middle = len(good) // 2
    bad = {"flip": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "cut": good[:-9], "empty": b""}
    path.write_bytes(bad[damage])
    made.clear()
    with caplog.at_level(logging.WARNING):
        assert_equal(load_dataset_groups(data, tiny_tokenizer, split="train"), whole)
    assert made == ["train"]
    assert f"{path} is damaged: its rows are tokenised again" in caplog.text
    assert path.read_bytes() == good


def test_what_is_small_is_kept_where_that_is_asked_for(data, tiny_tokenizer, monkeypatch, tmp_path, made):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "own"))
    auto = replace(data, cache="auto")
    load_dataset_groups(auto, tiny_tokenizer, split="train")
    load_dataset_groups(replace(data, cache="none"), tiny_tokenizer, split="train")
    assert not (tmp_path / "own").exists()
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 100)
    load_dataset_groups(auto, tiny_tokenizer, split="train")
    assert [path.suffix for path in (tmp_path / "own" / "rows").iterdir()] == [".arrow"]
    made.clear()
    load_dataset_groups(auto, tiny_tokenizer, split="train")
    assert made == []


def test_a_folder_that_cannot_be_written(data, tiny_tokenizer, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    blocked = replace(data, cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot keep tokenised rows in .*; .* set data\.cache to another folder"):
        load_dataset_groups(blocked, tiny_tokenizer, split="train")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 100)
    found = load_dataset_groups(replace(data, cache="auto"), tiny_tokenizer, split="train")
    assert_equal(found, load_dataset_groups(replace(data, cache="none"), tiny_tokenizer, split="train"))
    assert "the next start makes them again" in caplog.text


def test_tokenizers_with_code_of_their_own_keep_nothing(data, tiny_tokenizer):
    class Own(type(tiny_tokenizer)):
        pass

    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.__class__ = Own
    assert row_cache._place(sets_of(data, "train"), data, tokenizer) is None


def test_a_killed_writer_leaves_nothing_that_counts(data, tiny_tokenizer, monkeypatch, made):
    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            load_dataset_groups(data, tiny_tokenizer, split="train")
    (left,) = entries(data)
    made.clear()
    load_dataset_groups(data, tiny_tokenizer, split="train")
    assert made == ["train"]
    assert left in entries(data)
    # A day later nobody writes it any more.
    old = time.time() - 100_000
    os.utime(left, (old, old))
    load_dataset_groups(replace(data, max_length=60), tiny_tokenizer, split="train")
    assert left not in entries(data)


def test_what_nobody_reads_goes(data, tiny_tokenizer):
    load_dataset_groups(data, tiny_tokenizer, split="train")
    (first,) = entries(data)
    for age, stays in ((29, True), (31, False)):
        past = time.time() - age * 86_400
        os.utime(first, (past, past))
        load_dataset_groups(replace(data, max_length=50 + age), tiny_tokenizer, split="train")
        assert first.exists() is stays


def test_other_files_of_the_folder_stay(data, tiny_tokenizer):
    """A folder of the user's may be one of data."""
    folder, past = Path(data.cache), time.time() - 400 * 86_400
    folder.mkdir(exist_ok=True)
    others = [folder / name for name in ("data-00000-of-00001.arrow", ".notes.tmp", "abc.def.arrow")]
    for path in others:
        path.write_text("mine")
        os.utime(path, (past, past))
    load_dataset_groups(data, tiny_tokenizer, split="train")
    assert entries(data)
    assert all(path.exists() for path in others)


def test_rows_of_another_user_are_read_and_left(data, tiny_tokenizer, monkeypatch, made):
    """As of a folder that is only read: nothing of a file can be changed."""
    whole = load_dataset_groups(data, tiny_tokenizer, split="train")
    (path,) = entries(data)
    past = time.time() - 400 * 86_400
    os.utime(path, (past, past))
    unlink = Path.unlink

    def refused(place, *arguments, **options):
        if place == path:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(place))
        unlink(place, *arguments, **options)

    def untouched(place, *arguments, **options):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(place))

    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(row_cache.os, "utime", untouched)
    made.clear()
    assert_equal(load_dataset_groups(data, tiny_tokenizer, split="train"), whole)
    assert made == []
    load_dataset_groups(replace(data, max_length=60), tiny_tokenizer, split="train")
    assert made == ["train"]
    assert path.exists()


def test_the_first_process_of_a_machine_makes_rows_for_the_others(data, tiny_tokenizer, monkeypatch, made):
    """Each side of the wait, as the others see it."""
    order: list[str] = []
    monkeypatch.setattr(row_cache.distributed, "size", lambda: 2)
    monkeypatch.setattr(row_cache.distributed, "gather", lambda value, group=None: [value, value])
    monkeypatch.setattr(row_cache.distributed, "announce", lambda work: None)
    monkeypatch.setattr(row_cache.distributed, "barrier", lambda group=None: order.append(f"barrier {len(made)}"))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        load_dataset_groups(data, tiny_tokenizer, split="train")
    assert order == ["barrier 1", "barrier 1"]
    assert made == ["train"]


OF_A_RANK = """
import sys
from engine import distributed
from engine.config.schema import DataConfig, ModelConfig
from engine.data import load_dataset_groups, read
from engine.model import load_tokenizer
model, rows, cache = sys.argv[1:]
made, inner = [], read.stream_set
read.stream_set = lambda one, *arguments, **options: made.append(one.split) or inner(one, *arguments, **options)
with distributed.process_group():
    data = DataConfig(dataset_name=rows, max_length=120, cache=cache)
    dataset, report = load_dataset_groups(data, load_tokenizer(ModelConfig(model_name_or_path=model)), split="train")
    print(len(made), dataset.digest, report.counts)
"""


def test_of_two_processes_one_makes_the_rows(data, tiny_model_dir):
    one, other = launch([["-c", OF_A_RANK, str(tiny_model_dir), data.dataset_name, data.cache]] * 2)
    assert (one.code, other.code) == (0, 0), one.err + other.err
    (made, rows), (made_by_other, same) = (ended.out.split(maxsplit=1) for ended in (one, other))
    assert (made, made_by_other) == ("1", "0")
    assert rows == same
    assert len(entries(data)) == 1


def test_rows_of_unknown_files_are_made(data, tiny_tokenizer, monkeypatch):
    (one,) = sets_of(data, "train")
    unknown = SimpleNamespace(data=data, open=lambda: SimpleNamespace(files=None))
    assert row_cache._place([one, unknown], data, tiny_tokenizer) is None
