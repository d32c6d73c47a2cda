"""Races of ``benchmarks.gpu``: a contender that fails costs its own row."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.contenders import Contender, Outcome, Task, UnavailableError, contenders
from benchmarks.gpu_journal import Journal
from benchmarks.gpu_numbers import SMI_FIELDS, _clocks, _nvidia_smi, race
from benchmarks.gpu_table import Context
from benchmarks.inputs import make_inputs
from benchmarks.results import RESULTS
from benchmarks.shapes import HeadShape
from benchmarks.tasks import LOGPS

NAIVE = contenders(LOGPS)[0]


def _broken(task: Task) -> Callable[[], Outcome]:
    raise RuntimeError("\nno such kernel\nmore")


def _absent(task: Task) -> Callable[[], Outcome]:
    raise UnavailableError("the peer does not import")


def _fails_late(task: Task, after: int) -> Callable[[], Outcome]:
    run, calls = NAIVE.prepare(task), []

    def counted() -> Outcome:
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("out of something")
        return run()

    return counted


def run_race(folder: Path, *others: Contender, dead: tuple[str, ...] = ()) -> tuple[Any, dict[str, dict[str, Any]]]:
    """What the race returns or raises, and the rows that it left."""
    journal = Journal(folder / "gpu.jsonl")
    context = Context(journal, folder, dry_run=True, quick=True, deadline=time.monotonic() + 600)
    context.section, context.check = "head", "race"
    context.dead = frozenset(f"race | {name}" for name in dead)
    inputs = make_inputs("random", HeadShape(16, 8, 40), length=4)
    try:
        result: Any = race(context, lambda: inputs, {LOGPS: [NAIVE, *others]}, {"inputs": "random"}, rounds=2)
    except RuntimeError as error:
        result = error
    return result, {key.removeprefix("race | "): row for key, row in journal.read()["head"].by_key.items()}


def test_contenders_that_fail_are_rows(tmp_path: Path) -> None:
    others = (
        Contender("a peer that breaks", 1, _broken),
        Contender("a peer that is not there", 1, _absent),
        Contender("ours, broken", 1, _broken, ours=True),
        Contender("died before", 1, _broken),
    )
    result, rows = run_race(tmp_path, *others, dead=("died before",))
    assert result == {"ok": False, "rounds": 2}
    assert rows["naive logits"]["status"] == "ok"
    assert rows["naive logits"]["ms"] > 0
    assert "died before" not in rows
    assert rows["a peer that is not there"]["status"] == "skipped: absent"
    for name in ("a peer that breaks", "ours, broken"):
        assert rows[name]["status"] == "error"
        assert rows[name]["note"] == "not run: failed: RuntimeError: no such kernel"
        assert rows[name]["where"].endswith("in _broken")


def test_a_late_failure_leaves_what_was_measured(tmp_path: Path) -> None:
    late = Contender("fails in the second round", 1, partial(_fails_late, after=2))
    result, rows = run_race(tmp_path, late)
    assert isinstance(result, RuntimeError)
    assert rows["naive logits"]["ms"] > 0
    assert rows["fails in the second round"]["ms"] > 0


@pytest.mark.parametrize("what", ["status", "task", "inputs"])
def test_rows_say_what_they_are_of(tmp_path: Path, what: str) -> None:
    _, rows = run_race(tmp_path)
    assert rows["naive logits"][what] == {"status": "ok", "task": LOGPS, "inputs": "random"}[what]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that answers each field of a query by what an H100 says, or by the field's name."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\nfor a; do case $a in --query-gpu=*) fields=${a#--query-gpu=};; esac; done\n"
        "echo $fields | sed 's/name/NVIDIA H100 80GB HBM3/; s/,/, /g'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("smi")
def test_results_go_to_the_devices_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.default_folder(tmp_path, dry_run=False) == RESULTS / "nvidia-h100-80gb-hbm3"
    assert gpu.default_folder(tmp_path, dry_run=True) == tmp_path / "results"
    monkeypatch.setenv("OUT", str(tmp_path / "elsewhere"))
    assert gpu.default_folder(tmp_path, dry_run=False) == tmp_path / "elsewhere"


@pytest.mark.usefixtures("smi")
def test_every_field_of_nvidia_smi_has_its_value() -> None:
    found = _nvidia_smi()
    assert list(found) == SMI_FIELDS.split(",")
    assert found["name"] == "NVIDIA H100 80GB HBM3"
    assert all(found[field] == field for field in SMI_FIELDS.split(",")[1:])
    assert "power.draw power.draw" in _clocks()
