from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engine.data.groups import PreferenceDataset
from engine.data.sources import Row, open_source
from engine.errors import UserError
from engine.reference import export_columns, import_columns
from engine.reference.columns import check_export_path


@pytest.fixture
def source_rows(pairs_jsonl) -> list[Row]:
    return list(open_source(str(pairs_jsonl)))


@pytest.fixture
def kept(make_groups) -> PreferenceDataset:
    """Groups of 24 source rows, of which lint dropped two."""
    return PreferenceDataset([g for g in make_groups(24) if g.row not in (3, 11)])


@pytest.fixture
def sums(kept) -> list[tuple[float, ...]]:
    return [(-1.25 - g.row, -0.1 * g.row) for g in kept]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_export_keeps_rows_order_and_values(tmp_path, source_rows, kept, sums, name):
    path = tmp_path / name
    assert export_columns(path, source_rows, kept, sums) == (22, 2)
    expected = [
        source_rows[group.row].data | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for group, (chosen, rejected) in zip(kept, sums, strict=True)
    ]
    assert [row.data for row in open_source(str(path))] == expected
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_equal_rows_are_equal_files(tmp_path, source_rows, kept, sums):
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    for path in (first, second):
        export_columns(path, source_rows, kept, sums)
    assert first.read_bytes() == second.read_bytes()
    assert len(gzip.decompress(first.read_bytes()).splitlines()) == 22


def test_existing_columns_and_files_are_replaced(tmp_path, source_rows, kept, sums):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    stale = [replace(r, data=r.data | {"ref_chosen_logps": 5.0, "ref_rejected_logps": 6.0}) for r in source_rows]
    export_columns(path, stale, kept, sums)
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["ref_chosen_logps"], first["ref_rejected_logps"]) == sums[0]


def test_ranked_rows_get_their_values_in_the_order_of_their_responses(tmp_path, make_groups):
    rows = [Row(0, {"prompt": "p", "responses": ["x", "y", "z"], "ranking": [2, 3, 1]}, "data")]
    dataset = PreferenceDataset(make_groups(1, responses=3))
    # The group's order is best first: z, x, y.
    export_columns(tmp_path / "out.jsonl", rows, dataset, [(-1.0, -2.0, -3.0)])
    assert json.loads((tmp_path / "out.jsonl").read_text())["ref_logps"] == [-2.0, -3.0, -1.0]


def test_parquet_holds_rows_whose_columns_differ(tmp_path, make_groups, monkeypatch):
    monkeypatch.setattr("engine.reference.columns._PARQUET_ROWS", 2)
    extras = [{}, {"score": None}, {"score": 1}, {"score": 2.5}, {"messages": [{"role": "user", "content": "x"}]}]
    rows = [Row(i, {"prompt": "p", "chosen": "c", "rejected": "r"} | e, "data") for i, e in enumerate(extras)]
    path = tmp_path / "out.parquet"
    export_columns(path, rows, PreferenceDataset(make_groups(5)), [(-1.0, -2.0)] * 5)
    table = pq.read_table(path)
    assert table.column("score").to_pylist() == [None, None, 1.0, 2.5, None]
    assert table.column("messages").to_pylist()[4] == [{"role": "user", "content": "x"}]
    assert table.column("ref_rejected_logps").to_pylist() == [-2.0] * 5


def test_rows_that_do_not_fit_a_format_are_named(tmp_path, make_groups):
    dataset = PreferenceDataset(make_groups(2))
    odd = [Row(0, {"x": b"bytes"}, "data"), Row(1, {"x": "text"}, "data")]
    with pytest.raises(UserError, match=r"cannot be written as JSON .*export to \.parquet"):
        export_columns(tmp_path / "out.jsonl", odd, dataset, [(-1.0, -2.0)] * 2)
    mixed = [Row(0, {"x": [1]}, "data"), Row(1, {"x": "text"}, "data")]
    with pytest.raises(UserError, match=r"do not fit one Parquet table .*export to \.jsonl"):
        export_columns(tmp_path / "out.parquet", mixed, dataset, [(-1.0, -2.0)] * 2)
    assert not list(tmp_path.iterdir())


def test_the_dataset_itself_is_never_overwritten(tmp_path, source_rows, kept, sums, pairs_jsonl):
    copy = tmp_path / "pairs.jsonl"
    copy.write_bytes(Path(pairs_jsonl).read_bytes())
    with pytest.raises(UserError, match="is the dataset itself"):
        export_columns(copy, open_source(str(copy)), kept, sums)
    assert copy.read_bytes() == Path(pairs_jsonl).read_bytes()


@pytest.mark.parametrize(
    ("name", "message"), [("out.csv", "expected a name that ends in"), ("absent/out.jsonl", "does not exist")]
)
def test_a_bad_export_path_is_refused_early(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        check_export_path(tmp_path / name)


def test_a_full_disk_keeps_the_old_export(tmp_path, source_rows, kept, sums, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.reference.columns.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*out\.jsonl: no space left on the disk; free space or cho"):
        export_columns(path, source_rows, kept, sums)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert path.read_text() == "old"


def test_import_takes_all_or_none(make_groups):
    groups = make_groups(5)
    assert import_columns(PreferenceDataset(groups)) is None
    with_sums = [replace(g, ref_logps=(-1.0, -2.0 - g.row)) for g in groups]
    assert import_columns(PreferenceDataset(with_sums)) == [(-1.0, -2.0 - row) for row in range(5)]
    with pytest.raises(UserError, match="row 2 has no ref_chosen_logps and ref_rejected_logps, while other rows have"):
        import_columns(PreferenceDataset([*with_sums[:2], groups[2], *with_sums[3:]]))
