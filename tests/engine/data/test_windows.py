"""Streams: windows follow each other without a row lost or twice, and go on from any place."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError

from engine.config.schema import DataConfig, DatasetConfig
from engine.data.sources import open_source
from engine.data.windows import WindowStream
from engine.errors import UserError

LONG = {"prompt": "Why? " * 60, "chosen": " So.", "rejected": " No."}
"""Lint drops it."""


def row(number: int) -> dict[str, str]:
    return {"prompt": f"What is {number}?", "chosen": f" It is {number}.", "rejected": " No."}


ROWS = [LONG if i in (3, 4, 11) else row(i) for i in range(25)]
KEPT = [i for i, one in enumerate(ROWS) if one is not LONG]


def lines(rows) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


def write(path: Path, rows) -> Path:
    kind = "".join(path.suffixes)
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(",".join(one.values()) + "\n" for one in rows))
    else:
        path.write_bytes(gzip.compress(lines(rows).encode()) if kind == ".jsonl.gz" else lines(rows).encode())
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the Hub: ``datasets`` streams files of three shards under the name of a dataset."""
    load = datasets.load_dataset
    opened = []
    shards = [write(tmp_path / f"shard{n}.jsonl", part) for n, part in enumerate((ROWS[:6], ROWS[6:12], ROWS[12:]))]

    def load_dataset(name, config, *, split, streaming=False):
        assert name == "org/large"
        assert streaming
        dataset = load("json", data_files={split: [str(shard) for shard in shards]}, split=split, streaming=True)
        opened.append(dataset)
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("engine.data.sources.unreachable", lambda endpoint: None)
    monkeypatch.chdir(tmp_path)
    return opened


@pytest.fixture(params=[".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", "two files", "saved", "hub", "address"])
def source(request, tmp_path):
    """The name of a dataset of ``ROWS``."""
    if request.param == "hub":
        request.getfixturevalue("hub")
        return "org/large"
    if request.param == "two files":
        write(tmp_path / "a.jsonl", ROWS[:9])
        write(tmp_path / "b.parquet", ROWS[9:])
        return str(tmp_path / "*.*")
    if request.param == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
        return str(tmp_path / "saved")
    if request.param == "address":
        with fsspec.open("memory://rows.jsonl", "w") as file:
            file.write(lines(ROWS))
        return "memory://rows.jsonl"
    return str(write(tmp_path / f"rows{request.param}", ROWS))


def open_stream(tokenizer, *, size: int, **data) -> WindowStream:
    return WindowStream(DataConfig(streaming=True, max_length=60, **data), tokenizer, size=size)


def rows_of(window) -> list[int]:
    return [group.row for group in window.dataset]


def test_windows_follow_each_other_and_go_on_from_any_place(source, tiny_tokenizer):
    stream = open_stream(tiny_tokenizer, size=6, dataset_name=source)
    windows = [stream.next() for _ in range(9)]
    assert [row for window in windows for row in rows_of(window)] == (KEPT * 3)[:54]
    assert sum(window.report.total for window in windows[:4]) + 1 >= len(ROWS)
    assert (stream.whole, stream.rows) == (False, 25 if source.endswith("saved") else None)
    for number, window in enumerate(windows[:-1]):
        again = open_stream(tiny_tokenizer, size=6, dataset_name=source)
        again.next()
        again.seek(json.loads(json.dumps(window.after)))
        assert rows_of(again.next()) == rows_of(windows[number + 1])


@pytest.mark.parametrize("size", [22, 23, 100])
def test_what_ends_in_its_first_window_is_that_window(size, source, tiny_tokenizer):
    stream = open_stream(tiny_tokenizer, size=size, dataset_name=source)
    windows = [stream.next() for _ in range(3)]
    assert [rows_of(window) for window in windows] == [KEPT] * 3
    assert stream.whole == (size > 22)
    assert {(window.report.total, window.report.dropped) for window in windows[size == 22 :]} == {(25, 3)}


def test_a_slice_and_a_limit_bound_every_pass(source, tiny_tokenizer):
    if "://" not in source:
        options = {"dataset_name": source, "dataset_train_split": "train[2:20]", "max_rows": 12}
        stream = open_stream(tiny_tokenizer, size=7, **options)
        kept = [i for i in KEPT if 2 <= i < 14]
        assert [row for _ in range(4) for row in rows_of(stream.next())] == (kept * 4)[:28]


def test_nothing_before_the_place_is_read_again(hub, tmp_path, tiny_tokenizer):
    """Neither the first shard of a dataset of the Hub, nor the first of several files."""
    for name in ("org/large", str(tmp_path / "shard*.jsonl")):
        stream, again = (open_stream(tiny_tokenizer, size=6, dataset_name=name) for _ in range(2))
        windows = [stream.next() for _ in range(4)]
        again.next()
        (tmp_path / "shard0.jsonl").rename(tmp_path / "gone")
        again.seek(windows[1].after)
        assert rows_of(again.next()) == rows_of(windows[2])
        (tmp_path / "gone").rename(tmp_path / "shard0.jsonl")


def test_sets_of_a_mixture_are_drawn_by_weight_and_come_round_on_their_own(tmp_path, tiny_tokenizer):
    names = {"large": [row(i) for i in range(40)], "small": [row(100 + i) for i in range(5)]}
    sets = [
        {"name": str(write(tmp_path / f"{name}.jsonl", rows)), "weight": weight}
        for (name, rows), weight in zip(names.items(), (3, 1), strict=True)
    ]
    stream = open_stream(tiny_tokenizer, size=8, datasets=tuple(DatasetConfig(**one) for one in sets))
    assert stream.counts == (6, 2)
    windows = [stream.next() for _ in range(4)]
    drawn = {name: [g.row for w in windows for g in w.dataset if g.source == name] for name in names}
    assert drawn == {"large": list(range(24)), "small": [0, 1, 2, 3, 4, 0, 1, 2]}
    again = open_stream(tiny_tokenizer, size=8, datasets=tuple(DatasetConfig(**one) for one in sets))
    again.next()
    again.seek(windows[1].after)
    assert rows_of(again.next()) == rows_of(windows[2])
    assert windows[2].report.of("small").counts == {}


@pytest.mark.parametrize("strict", [False, True])
def test_lint_is_of_each_window(strict, tmp_path, tiny_tokenizer):
    rows = [row(i) for i in range(20)]
    rows[13] = rows[12]
    path = write(tmp_path / "rows.jsonl", rows)
    stream = open_stream(tiny_tokenizer, size=5, dataset_name=str(path), strict=strict)
    reports = [stream.next().report for _ in range(2)]
    assert [report.counts for report in reports] == [{}, {}]
    if strict:
        with pytest.raises(UserError, match=r"duplicate in 1 of 5 rows \(row 13\)"):
            stream.next()
    else:
        assert stream.next().report.rows("duplicate") == [13]


def test_a_row_that_cannot_be_read_is_named_when_its_window_comes(hub, tmp_path, tiny_tokenizer):
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text().replace('"What is 17?"', "17"))
    stream = open_stream(tiny_tokenizer, size=8, dataset_name=str(path))
    stream.next()
    with pytest.raises(UserError, match=r"rows\.jsonl, row 17 \(line 18\)"):
        stream.next()
    shard = tmp_path / "shard2.jsonl"
    shard.write_text(shard.read_text() + "{broken\n")
    stream = open_stream(tiny_tokenizer, size=8, dataset_name="org/large")
    with pytest.raises(UserError, match=r"^org/large, row \d+: the stream ended: "):
        [stream.next() for _ in range(4)]


@pytest.mark.parametrize("client", ["hub", "fsspec"])
def test_a_connection_that_is_lost_names_the_row(client, monkeypatch):
    """What the libraries raise that ``datasets`` reads through is no OSError, and an import of one may be absent."""
    kinds = {"fsspec": type("ClientError", (Exception,), {}), "hub": HfHubHTTPError.__mro__[1]}
    monkeypatch.setitem(sys.modules, "aiohttp", SimpleNamespace(ClientError=kinds["fsspec"]))

    def load(*names, **options):
        def rows():
            yield row(0)
            raise kinds[client]("the peer closed the connection")

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source(("https://host/a.jsonl", "https://host/b.jsonl"), streaming=True)
    with pytest.raises(UserError, match=r"https://host/a\.jsonl, row 1: the stream ended: the peer closed the conn"):
        list(source.read_on())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"eval_fraction": 0.1}, r"data\.eval_fraction needs the whole set, which data\.streaming never holds"),
        ({"stream_window": 0}, r"data\.stream_window must be positive, got 0"),
        ({"dataset_train_split": "train[:50%]"}, r"rows once, so their number is not known: write the slice with row"),
        ({"dataset_name": "https://x/y.txt"}, r"https://x/y\.txt: expected addresses of one kind of file: \.jsonl"),
        ({"dataset_name": "https://x/y.json", "dataset_train_split": "test"}, "is read whole, without splits"),
        ({"dataset_name": "https://x/y.json", "streaming": False}, r"is an address: set data\.streaming to true, or d"),
        ({"dataset_name": None, "datasets": ["a", "b"], "size": 1}, r"a window of 1 rows has none of some of the 2 se"),
        ({"dataset_name": None, "datasets": ["a"], "amount": "rows"}, r"sets by weight, .*; data\.datasets has rows"),
    ],
)
def test_what_a_stream_cannot_do_is_one_line(data, message, tmp_path, tiny_tokenizer):
    paths = {name: str(write(tmp_path / f"{name}.jsonl", ROWS)) for name in ("a", "b")}
    size, amount = data.pop("size", 8), data.pop("amount", "weight")
    if "datasets" in data:
        data["datasets"] = tuple(DatasetConfig(name=paths[name], **{amount: 1}) for name in data["datasets"])
    options = {"dataset_name": paths["a"], "streaming": True, "max_length": 60, **data}
    with pytest.raises((UserError, ValueError), match=message):
        WindowStream(DataConfig(**options), tiny_tokenizer, size=size).next()
