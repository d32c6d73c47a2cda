from __future__ import annotations

import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import UserError
from engine.reference import shards


def rows(count: int = 20, seed: int = 0) -> dict[bytes, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {rng.bytes(16): -rng.exponential(2, rng.integers(1, 30)).astype(np.float32) for _ in range(count)}


def read(path) -> dict[bytes, np.ndarray]:
    keys = [bytes(k) for k in shards.read_keys(path).view(("V", 16)).tolist()]
    return dict(zip(keys, shards.read_values(path).take(np.arange(len(keys))), strict=True))


def same(first, second) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[k], second[k]) for k in first)


def test_round_trip_is_exact_and_the_file_is_plain_parquet(tmp_path):
    values = rows()
    path = shards.write_shard(tmp_path / "store", values)
    assert same(read(path), values)
    table = pq.read_table(path)
    assert table.column("key").to_pylist() == list(values)
    assert table.schema.field("logps").type == pa.list_(pa.float32())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_keys_may_end_in_zero_bytes(tmp_path):
    values = {b"\0" * 16: np.float32([-1]), b"a" + b"\0" * 15: np.float32([-2]), b"ab" + b"\0" * 14: np.float32([-3])}
    assert same(read(shards.write_shard(tmp_path, values)), values)


def test_only_wanted_rows_are_returned(tmp_path):
    values = rows()
    path = shards.write_shard(tmp_path, values)
    found = shards.read_values(path).take(np.asarray([7, 2]))
    assert np.array_equal(found[0], list(values.values())[7])
    assert np.array_equal(found[1], list(values.values())[2])


def test_sums_are_in_double_precision(tmp_path):
    values = rows() | {b"l" * 16: np.full(100_000, -0.1, np.float32)}
    found = shards.read_values(shards.write_shard(tmp_path, values)).sums(np.arange(21))
    np.testing.assert_allclose(found, [v.sum(dtype=np.float64) for v in values.values()], rtol=1e-14)


def test_the_same_rows_are_one_file(tmp_path):
    assert shards.write_shard(tmp_path, rows()) == shards.write_shard(tmp_path, rows())
    assert shards.write_shard(tmp_path, rows(seed=1)) != shards.write_shard(tmp_path, rows())


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_every_damaged_byte_is_named_or_changes_nothing(mask, tmp_path):
    """One bit or all bits of each byte in turn: the file is named in one line, or exactly the same values are read."""
    values = rows(6)
    path = shards.write_shard(tmp_path, values)
    good = path.read_bytes()
    chunks = [pq.read_metadata(path).row_group(0).column(i) for i in range(2)]
    data = {p for c in chunks for p in range(c.data_page_offset, c.data_page_offset + c.total_compressed_size)}
    refused, content_refused = 0, 0
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ mask]) + good[position + 1 :])
        try:
            # Bytes of statistics and of the writer's name carry nothing that is read.
            assert same(read(path), values), f"byte {position} changed what was read"
        except UserError as error:
            message = str(error)
            assert str(path) in message
            assert "delete this file" in message
            assert "\n" not in message
            refused += 1
            content_refused += position in data
    # Which other bytes are read is the library's choice.
    assert content_refused > len(data) // 2
    assert refused > content_refused


def test_every_truncation_is_named(tmp_path):
    path = shards.write_shard(tmp_path, rows(6))
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=r"is damaged: .*; delete this file and run `dpo precompute`"):
            shards.read_keys(path)


def test_values_that_do_not_match_the_checksum_are_refused(tmp_path):
    path = shards.write_shard(tmp_path, rows())
    table = pq.read_table(path)
    changed = [[v * 2 for v in row] for row in table.column("logps").to_pylist()]
    table = table.set_column(1, "logps", pa.array(changed, pa.list_(pa.float32())))
    pq.write_table(table, path)
    assert len(shards.read_keys(path)) == 20
    with pytest.raises(UserError, match="content does not match its checksum"):
        shards.read_values(path)


def test_another_format_and_a_foreign_file_are_named(tmp_path):
    path = shards.write_shard(tmp_path, rows())
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"dpo.reference.format": b"9"}), path)
    with pytest.raises(UserError, match="has format 9, this version reads 1"):
        shards.read_keys(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(UserError, match="lacks the marks of a shard"):
        shards.read_keys(path)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    kept = shards.write_shard(tmp_path, rows())

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            UserError, match=r"cannot write .*no space left on the disk; free space or choose another folder"
        ):
            shards.write_shard(tmp_path, rows(seed=1))
    assert list(tmp_path.iterdir()) == [kept]


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    real = os.write
    calls = []

    def short_then_full(descriptor, data):
        calls.append(len(data))
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 4])

    monkeypatch.setattr(os, "write", short_then_full)
    with pytest.raises(UserError, match="no space left"):
        shards.write_shard(tmp_path, rows())
    assert not list(tmp_path.iterdir())


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100]))
    assert same(read(shards.write_shard(tmp_path, rows())), rows())


def test_only_old_temporaries_are_removed(tmp_path):
    young, old = tmp_path / ".a.1.tmp", tmp_path / ".b.1.tmp"
    for path in (young, old):
        path.write_bytes(b"half")
    past = time.time() - 2 * shards.TEMPORARY_AGE_SECONDS
    os.utime(old, (past, past))
    shards.remove_stale_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [young]
