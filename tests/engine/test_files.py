from __future__ import annotations

import errno
import os

import pytest

from engine.files import replace_file


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x"
    replace_file(path, b"one")
    replace_file(path, memoryview(b"two"))
    replace_file(tmp_path / "empty", b"")
    assert path.read_bytes() == b"two"
    assert (tmp_path / "empty").read_bytes() == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "x"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    replace_file(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failure_leaves_what_was_there_alone(call, tmp_path, monkeypatch):
    path = tmp_path / "x"
    replace_file(path, b"one")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"two")
    monkeypatch.undo()
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
