from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.reference import ReferenceStore
from engine.reference import store as store_module

ROOT = Path(__file__).resolve().parents[3]
MODEL_A, MODEL_B = b"\x01\x02\x03\x04", b"\xff\0\0\0"

# Each row is known from writer, batch and place, so that a reader can tell what every stored value has to be. One
# process pays for the imports and forks a writer for every line of its input.
NURSERY = """
import os, signal, sys
import numpy as np
from engine.reference.store import ReferenceStore

def rows(writer, batch, count=50):
    values = {}
    for i in range(count):
        rng = np.random.default_rng([writer, batch, i])
        values[bytes([1, 2, 3, 4]) + rng.bytes(12)] = -rng.exponential(2, 1 + i).astype(np.float32)
    return values

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        folder, writer, batches, log = line.split()
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        store, report = ReferenceStore(folder), os.open(log, os.O_WRONLY | os.O_CREAT)
        for batch in range(int(batches)):
            store.add(rows(int(writer), batch))
            os.write(report, b"%d " % batch)
        os._exit(0)
"""


class Nursery:
    """Starts writer processes, and tells which batches each has reported as durable."""

    def __init__(self, folder: Path):
        path = folder / "nursery.py"
        path.write_text(NURSERY)
        namespace: dict = {"__name__": "nursery"}
        exec(compile(NURSERY, str(path), "exec"), namespace)
        self.rows = namespace["rows"]
        self._folder = folder
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, store: Path, writer: int, batches: int) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{store} {writer} {batches} {self._folder / str(writer)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def reported(self, writer: int) -> int:
        log = self._folder / str(writer)
        return len(log.read_text().split()) if log.exists() else 0

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


def values(count: int = 20, seed: int = 0, prefix: bytes = MODEL_A) -> dict[bytes, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {prefix + rng.bytes(12): -rng.exponential(2, rng.integers(1, 30)).astype(np.float32) for _ in range(count)}


def assert_holds(store: ReferenceStore, expected: dict[bytes, np.ndarray]) -> None:
    found = store.get(list(expected))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        assert np.array_equal(found[key], value)
    sums = store.sums(list(expected))
    np.testing.assert_allclose([sums[key] for key in expected], [v.sum(dtype=np.float64) for v in expected.values()])


def test_an_absent_folder_is_an_empty_store(tmp_path):
    store = ReferenceStore(tmp_path / "none")
    assert len(store) == 0
    assert store.get([b"x" * 16]) == {}
    assert store.missing([b"x" * 16]) == [b"x" * 16]
    assert not (tmp_path / "none").exists()


def test_what_is_added_is_there_now_and_after_opening_again(tmp_path):
    store = ReferenceStore(tmp_path)
    first, second = values(), values(seed=1)
    store.add(first)
    assert_holds(store, first)
    store.add(second)
    for opened in (store, ReferenceStore(tmp_path)):
        assert_holds(opened, first | second)
        assert len(opened) == 40
        assert next(iter(first)) in opened
        assert b"y" * 16 not in opened


def test_missing_keeps_order_and_drops_repeats(tmp_path):
    store = ReferenceStore(tmp_path)
    stored = values()
    store.add(stored)
    absent = list(values(5, seed=2)) + list(values(3, seed=3, prefix=MODEL_B))
    mixed = [absent[6], *list(stored)[:3], absent[0], absent[6], absent[2]]
    assert store.missing(mixed) == [absent[6], absent[0], absent[2]]
    assert store.missing(list(stored)) == []


def test_models_lie_apart_and_only_the_wanted_one_is_read(tmp_path):
    store = ReferenceStore(tmp_path)
    mine, other = values(), values(prefix=MODEL_B)
    store.add(mine | other)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MODEL_A.hex(), MODEL_B.hex()]
    assert_holds(ReferenceStore(tmp_path), mine | other)
    next((tmp_path / MODEL_B.hex()).iterdir()).write_bytes(b"damaged")
    reopened = ReferenceStore(tmp_path)
    assert_holds(reopened, mine)
    with pytest.raises(UserError, match="is damaged"):
        len(reopened)


def test_a_large_addition_is_split_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "TOKENS_PER_SHARD", 40)
    store = ReferenceStore(tmp_path)
    rows = values(30) | {MODEL_A + b"z" * 12: np.full(100, -1, np.float32)}
    store.add(rows)
    assert len(list((tmp_path / MODEL_A.hex()).iterdir())) > 10
    assert_holds(ReferenceStore(tmp_path), rows)


def test_duplicates_across_shards_are_harmless(tmp_path):
    rows = values(4)
    keys = list(rows)
    store = ReferenceStore(tmp_path)
    store.add(rows)
    store.add({keys[1]: rows[keys[1]], **values(2, seed=5)})
    reopened = ReferenceStore(tmp_path)
    assert_holds(reopened, rows)
    assert len(reopened) == 6


def test_of_duplicates_the_older_value_is_found_whatever_is_added_later(tmp_path):
    """A second process may have computed the same row in another pack, with other rounding."""
    rows = values(4)
    ReferenceStore(tmp_path).add(rows)
    (first,) = (tmp_path / MODEL_A.hex()).iterdir()
    os.utime(first, ns=(10**18, 10**18))
    for attempt in range(6):
        # Names are checksums, so some of these come before the first shard's and some after.
        ReferenceStore(tmp_path).add({key: value - 0.01 * (attempt + 1) for key, value in rows.items()})
    names = sorted(path.name for path in first.parent.iterdir())
    assert 0 < names.index(first.name) < 6
    assert_holds(ReferenceStore(tmp_path), rows)


def test_a_look_up_sees_what_others_added_and_removed(tmp_path):
    reader, other = ReferenceStore(tmp_path), ReferenceStore(tmp_path)
    rows, more = values(), values(seed=1)
    assert len(reader.missing(list(rows))) == 20
    other.add(rows)
    assert_holds(reader, rows)
    first_shard = next((tmp_path / MODEL_A.hex()).iterdir())
    other.add(more)
    first_shard.unlink()
    assert_holds(reader, more)
    assert len(reader.missing(list(rows))) == 20
    assert len(reader) == 20


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([-1.0, np.nan], "must be finite, got nan"),
        ([-np.inf], "must be finite, got -inf"),
        ([1e300], "must be finite, got inf"),
        ([], "non-empty vector"),
        ([[-1.0]], "non-empty vector"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_values_are_refused_and_nothing_is_written(tmp_path, value, message):
    store = ReferenceStore(tmp_path)
    with pytest.raises(ValueError, match=message):
        store.add(values() | {MODEL_A + b"x" * 12: np.asarray(value)})
    assert not list(tmp_path.iterdir())


def test_a_key_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="16 bytes, got 3"):
        ReferenceStore(tmp_path).add({b"abc": np.float32([-1])})


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    path = tmp_path / "store"
    path.write_text("")
    with pytest.raises(UserError, match=r"reference\.store: .*store is a file; give a folder"):
        ReferenceStore(path)


def test_a_damaged_shard_is_named_when_its_model_is_read(tmp_path):
    rows = values()
    ReferenceStore(tmp_path).add(rows)
    shard = next((tmp_path / MODEL_A.hex()).iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        ReferenceStore(tmp_path).get(list(rows))


def test_leftovers_of_killed_writers_are_ignored(tmp_path):
    rows = values()
    ReferenceStore(tmp_path).add(rows)
    folder = tmp_path / MODEL_A.hex()
    (folder / ".abc.123.tmp").write_bytes(b"half a shard")
    assert_holds(ReferenceStore(tmp_path), rows)
    past = time.time() - 2 * 3600
    os.utime(folder / ".abc.123.tmp", (past, past))
    ReferenceStore(tmp_path).add(values(seed=1))
    assert not list(folder.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    # Permission bits do not bind root, so the refusal of the system is imitated.
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(UserError, match=r"reference log-probs to .*permission denied; check owner.*reference\.store"):
        ReferenceStore(tmp_path).add(values())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_can_be_read_but_not_extended(tmp_path):
    rows = values()
    ReferenceStore(tmp_path).add(rows)
    folder = tmp_path / MODEL_A.hex()
    folder.chmod(0o555)
    try:
        store = ReferenceStore(tmp_path)
        assert_holds(store, rows)
        with pytest.raises(UserError, match="permission denied"):
            store.add(values(seed=1))
    finally:
        folder.chmod(0o755)


def test_a_file_size_limit_ends_in_one_clear_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = ReferenceStore(tmp_path)
    store.add(values(2))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        with pytest.raises(
            UserError, match=r"larger than this system allows; raise the limit \(ulimit -f\) or choose another"
        ):
            store.add(values(500, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_holds(ReferenceStore(tmp_path), values(2))
    assert not list((tmp_path / MODEL_A.hex()).glob("*.tmp"))


@pytest.mark.parametrize("attempt", range(8))
def test_a_killed_writer_leaves_only_whole_shards(tmp_path, nursery, attempt):
    """SIGKILL at a random moment: every batch that was reported durable is there, and nothing is wrong."""
    pid = nursery.start(tmp_path, attempt, 100_000)
    wait_until(lambda: nursery.reported(attempt) >= 2)
    time.sleep(np.random.default_rng(attempt).uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))
    reported = nursery.reported(attempt)
    store = ReferenceStore(tmp_path)
    for batch in range(reported):
        assert_holds(store, nursery.rows(attempt, batch))
    # The batch in flight may have been renamed into place just before its report.
    in_flight = nursery.rows(attempt, reported)
    assert len(store.missing(list(in_flight))) in (0, 50)
    store.add(in_flight)
    assert_holds(ReferenceStore(tmp_path), in_flight)
    assert len(store) == 50 * (reported + 1)


def test_several_processes_may_write_at_once(tmp_path, nursery):
    writers = [nursery.start(tmp_path, number, 15) for number in (100, 101, 101)]
    reader = ReferenceStore(tmp_path)
    while any(is_alive(pid) for pid in writers):
        assert len(reader) % 50 == 0
    store = ReferenceStore(tmp_path)
    assert len(store) == len(reader) == 2 * 15 * 50
    for number in (100, 101):
        for batch in range(15):
            assert_holds(store, nursery.rows(number, batch))
