from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.durable import (
    MANIFEST,
    check_content,
    is_complete,
    remove_folder,
    replace_file,
    write_atomically,
    write_folder,
)
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")


def test_a_folder_is_complete_when_it_is_there(tmp_path):
    write_folder(tmp_path / "out", fill)
    assert is_complete(tmp_path / "out")
    check_content(tmp_path / "out", remedy="delete it")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("missing", ["a.bin", "sub/b.txt", MANIFEST])
def test_a_folder_without_one_of_its_files_is_not_complete(tmp_path, missing):
    write_folder(tmp_path / "out", fill)
    (tmp_path / "out" / missing).unlink()
    assert not is_complete(tmp_path / "out")


def test_a_truncated_file_or_manifest_is_not_complete(tmp_path):
    write_folder(tmp_path / "out", fill)
    manifest = (tmp_path / "out" / MANIFEST).read_bytes()
    for keep in (0, 1, len(manifest) // 2, len(manifest) - 3):
        (tmp_path / "out" / MANIFEST).write_bytes(manifest[:keep])
        assert not is_complete(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_bytes(manifest)
    (tmp_path / "out" / "a.bin").write_bytes(b"a" * 999)
    assert not is_complete(tmp_path / "out")


def test_a_flipped_byte_is_named(tmp_path):
    write_folder(tmp_path / "out", fill)
    (tmp_path / "out" / "a.bin").write_bytes(b"a" * 999 + b"b")
    assert is_complete(tmp_path / "out")
    with pytest.raises(UserError, match=r"a\.bin is damaged.*; delete it"):
        check_content(tmp_path / "out", remedy="delete it")


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """Flushes, renames and deletions that follow, as (call, name of the file or folder)."""
    made: list[tuple[str, str]] = []

    def watch(name: str, place: Callable[..., str]) -> None:
        call = getattr(os, name)

        def watched(*arguments, **options):
            made.append((name, Path(place(*arguments)).name))
            return call(*arguments, **options)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    watch("replace", lambda source, target: target)
    for name in ("unlink", "rmdir"):
        watch(name, lambda path: path)
    return made


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads the names of open files from /proc")
def test_files_are_flushed_before_the_rename_and_the_folder_after_it(tmp_path, calls):
    """What a power cut takes is what was not flushed."""
    write_folder(tmp_path / "out", fill)
    flushed = [name for call, name in calls if call == "fsync"]
    rename = calls.index(("replace", "out"))
    assert set(flushed[:2]) == {"a.bin", "b.txt"}
    assert flushed[2:] == [MANIFEST, "sub", ".out.incomplete", tmp_path.name]
    assert rename == len(calls) - 2
    calls.clear()
    write_atomically(tmp_path / "x.json", "one")
    assert [call for call, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[1:] == [("replace", "x.json"), ("fsync", tmp_path.name)]
    calls.clear()
    remove_folder(tmp_path / "out")
    # Nothing is deleted before the folder has lost its name for good.
    assert calls[:2] == [("replace", ".out.incomplete"), ("fsync", tmp_path.name)]
    assert {call for call, _ in calls[2:]} == {"unlink", "rmdir"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_process_left_is_replaced_and_never_counts(tmp_path):
    script = (
        "import os, signal; from pathlib import Path; from engine.durable import write_folder\n"
        "def fill(folder):\n (folder / 'a.bin').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_folder(Path({str(tmp_path / 'out')!r}), fill)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    assert not any(is_complete(p) for p in tmp_path.iterdir())
    write_folder(tmp_path / "out", fill)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failure_keeps_what_was_there(tmp_path):
    write_folder(tmp_path / "out", fill)

    def broken(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cannot write .*out: no space left on the disk.*--resume"):
        write_folder(tmp_path / "out", broken)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    check_content(tmp_path / "out", remedy="delete it")


def test_a_bug_is_not_reported_as_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_folder(tmp_path / "out", lambda folder: (folder / "x" / "y").write_text(""))
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "out", lambda folder: print(1 / 0))
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.json: no space left"):
        write_atomically(path, "three")
    with pytest.raises(UserError, match=r"no space left on the disk; free space or look elsewhere$"):
        write_atomically(path, "three", elsewhere="look elsewhere")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def _a_file_is_a_part(folder: Path) -> Path:
    (folder / "a").write_text("")
    return folder / "a" / "x.json"


def _a_folder_is_in_the_way(folder: Path) -> Path:
    (folder / "x.json" / "full").mkdir(parents=True)
    return folder / "x.json"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (_a_file_is_a_part, "a part of the path is a file, not a folder; move that file away or choose another tr"),
        (_a_folder_is_in_the_way, "a folder of that name is in the way; move it away or choose another train.output"),
        (lambda folder: folder / ("x" * 999), "the name is too long; choose another train.output_dir, then continue"),
    ],
)
def test_advice_fits_what_the_system_refuses(tmp_path, place, words):
    path = place(tmp_path)
    with pytest.raises(UserError) as refused:
        write_atomically(path, "one")
    assert words in str(refused.value)
    assert "free space" not in str(refused.value)


def test_bytes_are_replaced_whole(tmp_path):
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
