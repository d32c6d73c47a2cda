"""Disks that fill up and folders that cannot be written: named in one line, exit code 2, and nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engine.durable import check_content
from engine.train.checkpoint import complete_checkpoints
from tests.engine.kills.cases import CASES, write_config
from tests.engine.kills.evidence import compare, leavings, stored_values
from tests.engine.kills.harness import Attempt, Harness
from tests.engine.kills.victim import NO_SMALL_DISK, Trap

ADVICE = "or choose another train.output_dir, then continue with --resume"
STORE_ADVICE = "or choose another folder with reference.store"


@pytest.fixture
def place(harness: Harness, tmp_path: Path) -> Path:
    # Beside the harness's own runs: paths in files are compared up to this folder.
    return tmp_path / "place"


def assert_named(found: Attempt, place: Path, *words: str) -> None:
    """One line, of a user error, that has these words."""
    assert found.code == 2, found.output
    assert "Traceback" not in found.output
    line = found.output.splitlines()[-1]
    assert line.startswith("error: cannot write "), line
    for word in (str(place), *words):
        assert word in line, line


def assert_whole(place: Path) -> None:
    """What is there is whole, and nothing half-written lies beside it."""
    for _, path in complete_checkpoints(place / "run"):
        check_content(path, remedy="")
    left = [p.name for p in place.rglob(".*") if p.name.endswith((".tmp", ".incomplete"))]
    assert left == []


def assert_resumes(harness: Harness, name: str, place: Path) -> None:
    """A second start, with room, ends as a run without a fault."""
    case, baseline = CASES[name], harness.baseline(name)
    found = harness.attempt(case, place, resume=case.command == "train")
    assert found.code == 0, found.output
    compare(leavings(place), baseline.left)
    if case.own_store:
        compare(stored_values(place / "store"), baseline.values)


@pytest.mark.parametrize(
    ("name", "phase", "share"),
    [
        ("precompute", "shard", 0.5),
        ("full", "open", 0.0),
        ("full", "checkpoint", 0.0),
        ("full", "checkpoint", 0.6),
        ("beside", "checkpoint", 0.6),
        ("full", "export", 0.5),
        ("evaluated", "evaluation", 0.0),
    ],
)
def test_a_disk_that_is_full_from_some_moment_on(name, phase, share, harness: Harness, place: Path):
    case, baseline = CASES[name], harness.baseline(name)
    write_config(case, harness.folder, place)
    found = harness.attempt(case, place, Trap(phase, int(share * baseline.changes[phase]), "full"))
    advice = STORE_ADVICE if phase == "shard" else ADVICE
    assert_named(found, place, "no space left on the disk; free space", advice)
    assert_whole(place)
    if found.saved:
        assert max(found.saved) == complete_checkpoints(place / "run")[-1][0]
    assert_resumes(harness, name, place)


@pytest.mark.parametrize(
    ("name", "limit", "refused"),
    [("full", 100_000, "checkpoint-2"), ("lora", 16_000, "checkpoint-3"), ("precompute", 1_000, "store")],
)
def test_a_write_that_the_system_refuses(name, limit, refused, harness: Harness, place: Path):
    """Model and tokenizer are written by libraries that report a refusal each in its own way."""
    case = CASES[name]
    write_config(case, harness.folder, place)
    found = harness.attempt(case, place, file_bytes=limit)
    assert_named(found, place, refused, "raise the limit", STORE_ADVICE if refused == "store" else ADVICE)
    assert_whole(place)
    assert_resumes(harness, name, place)


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_small_disk(share, harness: Harness, place: Path):
    """A file system of its own that is too small for the run, where the system lets a test mount one."""
    case = CASES["evaluated"]
    needed = sum(p.stat().st_size for p in (harness.folder / "evaluated" / "whole" / "run").rglob("*") if p.is_file())
    write_config(case, harness.folder, place)
    found = harness.attempt(case, place, disk_bytes=int(share * needed))
    if found.code == NO_SMALL_DISK:
        pytest.skip("this system does not let a test mount a file system")
    assert_named(found, place, "no space left on the disk; free space", ADVICE)
    assert_whole(place)
    assert_resumes(harness, "evaluated", place)


def read_only(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o555)


def test_folders_that_cannot_be_written(harness: Harness, place: Path):
    train, precompute = CASES["full"], CASES["precompute"]
    write_config(train, harness.folder, place)
    read_only(place / "run")
    assert_named(harness.attempt(train, place, powerless=True), place, "run: permission denied", ADVICE)
    write_config(train, harness.folder, place, train={"output_dir": str(place / "sealed" / "run")})
    read_only(place / "sealed")
    assert_named(harness.attempt(train, place, powerless=True), place, "sealed/run: permission denied", ADVICE)
    write_config(precompute, harness.folder, place)
    read_only(place / "store")
    assert_named(
        harness.attempt(precompute, place, powerless=True), place, "store", "permission denied; check", STORE_ADVICE
    )


def test_a_run_folder_that_became_read_only(harness: Harness, place: Path):
    case = CASES["full"]
    write_config(case, harness.folder, place)
    assert harness.attempt(case, place, Trap("export", 0, "before")).saved == [2, 4, 6, 8]
    before = leavings(place)
    read_only(place / "run")
    found = harness.attempt(case, place, resume=True, powerless=True)
    assert_named(found, place, "run: permission denied", ADVICE)
    assert leavings(place) == before
    (place / "run").chmod(0o755)
    assert_resumes(harness, "full", place)


def last_byte_of_values(shard: Path) -> int:
    """Where the log-probs end in a shard: a byte that is read, whatever version of the library wrote the file."""
    column = pq.read_metadata(shard).row_group(0).column(1)
    return column.data_page_offset + column.total_compressed_size - 1


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


def test_a_store_that_cannot_be_read_or_is_damaged_is_named(harness: Harness, place: Path):
    """A damaged shard stops a run and names the file; without it, its rows alone are computed again."""
    case, baseline = CASES["references"], harness.baseline("references")
    write_config(case, harness.folder, place)
    shutil.copytree(harness.folder / "references" / "whole" / "store", place / "store")
    shard = sorted((place / "store").rglob("*.parquet"))[2]
    content = shard.read_bytes()
    for damaged in (content[:-7], flip(content, last_byte_of_values(shard)), b""):
        shard.write_bytes(damaged)
        found = harness.attempt(case, place)
        assert found.code == 2, found.output
        line = found.output.splitlines()[-1]
        assert line.startswith(f"error: the reference shard {shard} is damaged: ")
        assert "delete this file and run `dpo precompute`: only its rows are computed again" in line
        assert not (place / "run").exists()
    shard.unlink()
    found = harness.attempt(case, place)
    assert found.code == 0
    assert 0 < len(found.written) < len(baseline.values) / 2
    compare(leavings(place), baseline.left)
    compare(stored_values(place / "store"), baseline.values)
