"""Local files, row by row, and the errors that name their lines."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import readers
from engine.data.readers import read_file
from engine.errors import UserError

ROWS = [{"prompt": f"p {i} é世\u2028", "chosen": ["}", '"', "\\"], "rejected": {"a": [i, -1.5e3]}} for i in range(7)]


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def encode(rows, kind: str) -> bytes:
    if kind == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind, suffix):
    path = write(tmp_path / f"rows.{kind}{suffix}", encode(ROWS, kind))
    assert [row.data for row in read_file(path)] == ROWS


def test_lines_are_numbered_past_blank_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert [(row.line, row.data["a"]) for row in read_file(path)] == [(1, 1), (4, 2), (5, 3)]


def test_json_file_may_hold_json_lines(tmp_path):
    path = write(tmp_path / "a.json", encode(ROWS, "jsonl"))
    assert [row.data for row in read_file(path)] == ROWS


def test_array_elements_know_their_line(tmp_path):
    path = write(tmp_path / "a.json", b'\xef\xbb\xbf\n[\n {"a": 1},\n {"a":\n 2}\n, {"a": 3}]\n')
    assert [(row.line, row.data["a"]) for row in read_file(path)] == [(3, 1), (4, 2), (6, 3)]


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=3), st.one_of(st.text(max_size=12), st.integers(), st.floats(allow_nan=False), st.none())
        ),
        min_size=1,
        max_size=6,
    ),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_array_is_read_right_whatever_the_window(tmp_path_factory, rows, indent, ascii_only, chunk):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_CHARS", chunk)
        assert [row.data for row in read_file(path)] == rows


def test_array_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "big.json"
    with path.open("w") as stream:
        stream.write("[" + ",".join(json.dumps({"text": "x" * 1000, "i": i}) for i in range(20_000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_file(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 < path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": 2\n{"a": 3}\n',
            r"a\.jsonl, line 2, column 8: broken JSON: Expecting ','.*; correct or remove the line",
        ),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl, line 2: expected an object with named columns, got list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl.gz", b'{"a": 1}\n{"a"}\n', r"a\.jsonl\.gz, line 2, column 5: broken JSON"),
        ("a.json", b'[{"a": 1},\n {"a": 2},\n {"a": x}]', r"a\.json, line 3: broken JSON: Expecting value"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', r"a\.json, line 2: broken JSON: expected ',' or ']', got the end"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', r"a\.json, line 2: broken JSON: expected ',' or ']', got '\{'"),
        ("a.json", b'[{"a": 1},\n {"a": "2}]', r"a\.json, line 2: broken JSON: Unterminated string"),
        ("a.json", b'[{"a": 1},\n 3]', r"a\.json, line 2: expected an object with named columns, got int"),
        ("a.json", b'[{"a": 1},\n]', r"a\.json, line 2: broken JSON: Expecting value"),
        ("a.json", b'[{"a": 1}]\n\n[]', r"a\.json, line 3: broken JSON: text after the end"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff........"}]', r"a\.json, line 2: not UTF-8"),
        ("a.json", b'{\n  "a": 1\n}', r"a\.json, line 1, column 2: broken JSON: .*one array of objects"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n", r"a\.jsonl, line 2: this JSON cannot be read: Exceeds"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"}\n", r"a\.jsonl, line 1: this JSON cannot be read: maximum rec"),
        ("a.json", b'[{"a": 1},\n{"a": ' + b"1" * 5000 + b"}]", r"a\.json, line 2: this JSON cannot be read: Exceeds"),
        ("a.json", b"", r"a\.json holds no rows"),
        ("a.json", b"[ ]", r"a\.json holds no rows"),
        ("a.jsonl", b"\n\n", r"a\.jsonl holds no rows"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a readable Parquet file"),
        ("a.parquet", b"", r"a\.parquet is not a readable Parquet file"),
        ("a.txt", b"a,b", r"a\.txt: unknown kind of data file; expected \.jsonl, \.json, \.parquet"),
    ],
)
def test_fault_names_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        list(read_file(path))


def test_faults_of_gzip_and_of_the_file_system(tmp_path):
    whole = gzip.compress(encode(ROWS * 200, "jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"a": 1}\n')
    (tmp_path / "folder.json").mkdir()
    for name, message in (
        ("cut.jsonl.gz", "cut short or damaged"),
        ("plain.jsonl.gz", "not a gzip file"),
        ("folder.json", "cannot be read: Is a directory"),
        ("absent.json", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_file(tmp_path / name))


def test_rows_before_a_broken_line_are_read(tmp_path):
    rows = read_file(write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": 2}\n{broken\n'))
    assert [next(rows).data, next(rows).data] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match="line 3"):
        next(rows)


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffprompt,chosen\n"Hi, ""you""",two\n\n"a\nb",\n', encoding="utf-8")
    assert [(row.line, row.data) for row in read_file(path)] == [
        (2, {"prompt": 'Hi, "you"', "chosen": "two"}),
        (5, {"prompt": "a\nb", "chosen": ""}),
    ]
    with gzip.open(tmp_path / "rows.tsv.gz", "wt") as stream:
        stream.write("prompt\tchosen\na\tb, c\n")
    assert [row.data for row in read_file(tmp_path / "rows.tsv.gz")] == [{"prompt": "a", "chosen": "b, c"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2,3\n", r"rows\.csv, line 2: 3 cells for 2 columns"),
        (b'a,b\n"1,2\n', r"rows\.csv, line 2: broken CSV"),
        (b"a,b\n\xff,2\n", r"rows\.csv, line \d+: not UTF-8"),
        (b"a,a\n1,2\n", r"rows\.csv, line 1: two columns have one name"),
        (b"a,b\n", r"rows\.csv holds no rows"),
    ],
)
def test_broken_csv_is_named(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_file(path))
