"""``dpo check`` on many rows: memory does not grow with them, but for a few bytes each."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from engine.check import check
from engine.config.schema import DataConfig, ModelConfig, RunConfig
from engine.data import copies
from engine.data.copies import Copies, SeenKeys
from engine.data.groups import PreferenceGroup

BYTES_PER_ROW = 100
"""Three lengths and two keys are 12 + 16; keys are held in a set before they are sorted away, and merged in copies."""


def write_rows(path, count):
    with path.open("w") as stream:
        for i in range(count):
            row = {"prompt": f"Question {i}: where does the river go? ", "chosen": f"To sea {i}.", "rejected": "No."}
            stream.write(json.dumps(row) + "\n")


def config_of(model_dir, path):
    return RunConfig(model=ModelConfig(model_name_or_path=str(model_dir)), data=DataConfig(dataset_name=str(path)))


def test_memory_is_a_few_bytes_a_row(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "RECENT_KEYS", 500)
    peaks = {}
    for count in (1_000, 5_000):
        write_rows(tmp_path / "rows.jsonl", count)
        config = config_of(tiny_model_dir, tmp_path / "rows.jsonl")
        tracemalloc.start()
        checked = check(config)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert checked.reports["train"].total == count
        assert not checked.reports["train"].counts
    assert peaks[5_000] - peaks[1_000] < 4_000 * BYTES_PER_ROW < (tmp_path / "rows.jsonl").stat().st_size


def test_copies_are_found_at_any_distance(monkeypatch):
    monkeypatch.setattr(copies, "RECENT_KEYS", 50)

    def group(row, prompt, *responses):
        return PreferenceGroup(row, np.array([prompt], np.int32), tuple(np.array([r], np.int32) for r in responses))

    rows = [group(i, i, 1, 2) for i in range(1000)]
    rows += [group(1000, 3, 1, 2), group(1001, 990, 2, 1), group(1002, 999, 1, 3), group(1003, 999, 3, 1)]
    finder, found = Copies(), []
    for start in range(0, len(rows), 64):
        found += finder.find(rows[start : start + 64])
    assert found == [("duplicate", 1000), ("contradiction", 1001), ("contradiction", 1003)]


def test_seen_keys_take_eight_bytes_each(monkeypatch):
    monkeypatch.setattr(copies, "RECENT_KEYS", 256)
    keys = np.random.default_rng(0).integers(0, 2**63, 20_000, dtype=np.uint64)
    seen = SeenKeys()
    for start in range(0, len(keys), 100):
        assert not seen.settled(keys[start : start + 100]).any()
        seen.recent.update(keys[start : start + 100].tolist())
        seen.settle()
    settled = seen.settled(keys)
    assert all(settled | np.isin(keys, np.array(sorted(seen.recent), dtype=np.uint64)))
    assert sum(run.nbytes for run in seen._runs) <= 8 * len(keys)
    assert len(seen._runs) <= 8


@pytest.mark.slow
def test_a_million_rows(tiny_model_dir, tmp_path):
    """Peak memory of a process that checks a thousand and one that checks a million rows."""
    script = (
        "import sys, time, torch\n"
        "from engine.cli import main\n"
        "from engine.train.throughput import peak_memory_gib\n"
        "start = time.perf_counter()\n"
        "code = main(sys.argv[1:])\n"
        "seconds = time.perf_counter() - start\n"
        "print('MEASURED', code, peak_memory_gib(torch.device('cpu')), seconds)\n"
    )
    peaks = {}
    for count in (1_000, 1_000_000):
        path = tmp_path / f"{count}.jsonl"
        write_rows(path, count)
        config = tmp_path / f"{count}.yaml"
        config.write_text(f"model: {{model_name_or_path: {tiny_model_dir}}}\ndata: {{dataset_name: {path}}}\n")
        done = subprocess.run(
            [sys.executable, "-c", script, "check", str(config)], capture_output=True, text=True, check=True
        )
        _, code, gib, seconds = done.stdout.splitlines()[-1].split()
        print(f"{count:,} rows: {float(gib) * 1024:.0f} MiB, {count / float(seconds):,.0f} rows/s")
        assert (code, f"{count:,} preference rows, {count:,} kept" in done.stdout) == ("0", True)
        peaks[count] = float(gib) * 1024
    assert peaks[1_000_000] - peaks[1_000] < 200
