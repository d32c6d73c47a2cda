from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

import pytest

import engine
from engine.errors import UserError
from engine.files import expanded, replace_file
from engine.reference import ReferenceStore, default_store_path

ENGINE = Path(engine.__file__).parent


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


@pytest.fixture
def homeless(monkeypatch):
    """A user whose id is in no list, as in a container that is run by a number."""
    for name in ("HOME", "XDG_CACHE_HOME", "DPO_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_is_told_what_to_set(homeless, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no home folder for its default: set reference\.store, or .* DPO_CACHE"):
        default_store_path()
    with pytest.raises(UserError, match=r"^~/store: this user has no home folder that ~ could stand for"):
        ReferenceStore("~/store")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    assert default_store_path() == tmp_path / "reference"
    assert expanded("plain/path") == Path("plain/path")


def test_paths_of_users_are_expanded_in_one_place():
    found = [
        path.relative_to(ENGINE).as_posix() for path in ENGINE.rglob("*.py") if ".expanduser()" in path.read_text()
    ]
    assert sorted(found) == ["files.py", "reference/lookup.py"]
