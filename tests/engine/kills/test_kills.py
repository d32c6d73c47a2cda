"""Some of the kills of ``make kill``, two for each case of one process on the plain model, whose checkpoints training
waits for, and one for any other; and several processes at once on a store or a run folder."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.reference import ReferenceStore
from tests.engine.conftest import preference_rows
from tests.engine.kills.cases import CASES, MODEL, write_config
from tests.engine.kills.evidence import compare, leavings, stored_values
from tests.engine.kills.harness import Harness
from tests.engine.kills.together import ended

ROWS = 24


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_and_the_end_is_the_same(harness: Harness, name: str):
    case = CASES[name]
    runs = 2 if case.ranks == 1 and case.model == MODEL and not case.slow_seconds else 1
    for _ in range(runs):
        harness.run(name, kills=1)
    assert harness.tally.lost + harness.tally.inexact == []
    assert harness.tally.runs[name] == runs


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_passes_over_the_same_and_overlapping_rows_share_a_store(harness: Harness, tmp_path: Path):
    """Two passes over the same rows, one of which is killed, one over other rows and some of these, and a reader."""
    case, baseline = CASES["precompute"], harness.baseline("precompute")
    store = tmp_path / "store"
    alone, overlapping = tmp_path / "alone", tmp_path / "overlapping"
    data = tmp_path / "overlapping.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(ROWS + 8)[8:]))
    other = {"data": {"dataset_name": str(data)}, "packing": {"tokens_per_pack": 400}}
    write_config(case, harness.folder, alone, **other)
    assert harness.attempt(case, alone).code == 0
    expected = ReferenceStore(alone / "store")
    shared = {"reference": {"store": str(store)}}
    places = [tmp_path / name for name in ("first", "second", "killed")]
    for place in places:
        write_config(case, harness.folder, place, **shared)
    write_config(case, harness.folder, overlapping, **other, **shared)
    pids = [harness.start(case, place) for place in (*places, overlapping)]
    reader, whole = ReferenceStore(store), ReferenceStore(harness.folder / "precompute" / "whole" / "store")
    keys = [bytes.fromhex(key) for key in baseline.values]
    wait_for(lambda: len(list(store.rglob("*.parquet"))) >= 3)
    os.kill(pids[2], signal.SIGKILL)
    while not all(ended(pid) for pid in pids):
        # Whatever a reader finds meanwhile is right: of either pack, up to the rounding between them.
        for key, value in reader.get(keys).items():
            np.testing.assert_allclose(value, whole.get([key])[key], atol=2e-5)
    assert [harness.parent.wait(pid) for pid in pids] == [0, 0, -signal.SIGKILL, 0]
    reported = [harness.report(place) for place in (*places, overlapping)]
    assert all(key in ReferenceStore(store) for found in reported for key in map(bytes.fromhex, found.written))
    fresh = ReferenceStore(store)
    theirs = [bytes.fromhex(key) for key in stored_values(alone / "store")]
    for source, members in ((whole, keys), (expected, theirs)):
        for key, value in source.get(members).items():
            np.testing.assert_allclose(fresh.get([key])[key], value, atol=2e-5)
    again = harness.attempt(case, places[2])
    assert again.code == 0
    assert again.written == []
    assert f"{ROWS} rows reused, none computed" in again.output


def test_passes_over_the_same_rows_write_the_same_bits(harness: Harness, tmp_path: Path):
    case, baseline = CASES["precompute"], harness.baseline("precompute")
    places = [tmp_path / name for name in ("first", "second")]
    for place in places:
        write_config(case, harness.folder, place, reference={"store": str(tmp_path / "store")})
    pids = [harness.start(case, place) for place in places]
    assert [harness.parent.wait(pid) for pid in pids] == [0, 0]
    compare(stored_values(tmp_path / "store"), baseline.values)


def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(harness: Harness, tmp_path: Path):
    case, baseline = CASES["full"], harness.baseline("full")
    place, second = tmp_path / "place", tmp_path / "second"
    write_config(case, harness.folder, place)
    pid = harness.start(case, place)
    try:
        wait_for(lambda: (place / "run").is_dir() and "phase" in (place / "journal").read_text())
        os.kill(pid, signal.SIGSTOP)
        write_config(case, harness.folder, second, train={"output_dir": str(place / "run")})
        found = harness.attempt(case, second, resume=True)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found.code == 2
    assert "run is in use by another training process: wait for it, stop it, or choose another" in found.output
    assert harness.parent.wait(pid) == 0
    compare(leavings(place), baseline.left)
