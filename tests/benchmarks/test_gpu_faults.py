"""What ``benchmarks.gpu`` makes of sections that raise, die, hang, print garbage or run out of time: the rest stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_runner
from benchmarks.gpu_journal import Journal
from benchmarks.gpu_report import failures
from tests.benchmarks.faulty_sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--dry-run", "--table", "tests.benchmarks.faulty_sections"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, dict[str, Any]]:
    """Exit code, folder and gpu.json of a run of everything that does not wait."""
    folder = tmp_path_factory.mktemp("faults")
    names = [name for name in SECTIONS if name not in ("waiting", "last")]
    code = gpu.main([*OPTIONS, "--out", str(folder), "--sections", ",".join(names)])
    return code, folder, json.loads((folder / "gpu.json").read_text())["sections"]


def rows_of(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in section["rows"]}


def statuses(section: dict[str, Any]) -> dict[str, str]:
    return {row["key"]: row["status"] for row in section["rows"]}


def test_every_check_is_a_row(outcome) -> None:
    code, _, found = outcome
    assert code == 1
    assert statuses(found["raising"]) == {
        "fine": "ok",
        "raises": "error",
        "too large": "failed",
        "not a number": "failed",
        "skips": "skipped: nothing to do here",
        "says no": "failed",
        "bound twice": "ok",
    }
    error = rows_of(found["raising"])["raises"]
    assert error["error"] == "RuntimeError: first line of the fault"
    assert error["where"].startswith("faulty_sections.py:")
    assert error["where"].endswith("in _raise")


def test_a_process_that_dies_costs_one_check(outcome) -> None:
    found = outcome[2]["dying"]
    assert statuses(found) == {
        "fine": "ok",
        "exits": "died",
        "leaves": "died",
        "is killed": "died",
        "loses its device": "died",
        "crashes": "died",
        "behind them": "ok",
    }
    rows = rows_of(found)
    assert "exit code 3" in rows["exits"]["error"]
    assert "SIGKILL" in rows["is killed"]["error"]
    assert "SIGSEGV" in rows["crashes"]["error"]
    # The fault handler's stack; this repository's innermost frame.
    assert rows["crashes"]["where"].startswith("faulty_sections.py:")


def test_a_hang_costs_one_check(outcome) -> None:
    found = outcome[2]["hanging"]
    assert statuses(found) == {"hangs": "timed out", "behind it": "ok"}
    assert rows_of(found)["hangs"]["error"] == "not done after 2 s"
    assert rows_of(found)["hangs"]["where"].endswith("in _hang")


def test_a_part_in_which_the_process_ends_sits_out(outcome) -> None:
    rows = rows_of(outcome[2]["parts"])
    assert {key: row["status"] for key, row in rows.items()} == {
        "with parts": "ok",
        "with parts | one": "ok",
        "with parts | two": "died",
        "with parts | three": "ok",
        "behind it": "ok",
    }
    assert rows["with parts"]["done"] == 2


def test_a_part_in_which_the_process_ended_is_tried_again(outcome, tmp_path: Path) -> None:
    """Its check ended well without it, and runs anew with all its parts, as what is behind it does not."""
    _, folder, before = outcome
    shutil.copy(folder / "gpu.jsonl", tmp_path)
    journal = Journal(tmp_path / "gpu.jsonl")
    known = len(list(journal.lines()))
    assert gpu.main([*OPTIONS, "--out", str(tmp_path), "--sections", "parts", "--continue"]) == 1
    found = journal.read()["parts"]
    assert {key: row["status"] for key, row in found.by_key.items()} == statuses(before["parts"])
    ran = {line["check"] for line in list(journal.lines())[known:] if line["kind"] == "row"}
    assert ran == {"with parts"}


def test_garbage_is_only_logged(outcome) -> None:
    _, folder, found = outcome
    assert statuses(found["garbage"]) == {"prints": "ok", "behind it": "ok"}
    assert statuses(found["later"]) == {"fine": "ok"}
    log = (folder / "gpu.log").read_text()
    assert "[garbage.0] " in log
    assert "second line" in log


def test_a_section_without_its_list_is_a_row(outcome) -> None:
    assert rows_of(outcome[2]["import"])["the list of checks"]["error"] == "ImportError: no module of that name"


def test_shards_share_the_checks(outcome) -> None:
    found = statuses(outcome[2]["sharded"])
    assert found == {str(i): "died" if i == 1 else "ok" for i in range(6)}


def test_the_page_tells_all(outcome) -> None:
    _, folder, found = outcome
    page = (folder / "gpu.md").read_text()
    lines = failures(Journal(folder / "gpu.jsonl").read())
    bad = [row for s in found.values() for row in s["rows"] if not row["status"].startswith(("ok", "skipped"))]
    assert len(lines) == len(bad)
    assert all(line in page for line in lines)
    assert "first line of the fault" in page
    assert json.loads((folder / "gpu.json").read_text())["failures"] == lines


def test_killed_and_continued(tmp_path: Path) -> None:
    """SIGKILL, which nothing can answer: what was found is there, nobody goes on, and another run ends it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu", *OPTIONS, "--out", str(tmp_path)]
    names = ["--sections", "later,waiting,last"]
    journal = Journal(tmp_path / "gpu.jsonl")
    process = subprocess.Popen([*command, *names], cwd=ROOT, env=environment, start_new_session=True)
    try:
        _wait(lambda: "waits" in rows(journal, "waiting") and _published(tmp_path, "later") == "ok")
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    found = journal.read()
    assert found["later"].status == "ok"
    assert found["waiting"].by_key["before"]["value"] == 1.0
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["later"]["status"] == "ok"
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "row", "section": "lat')
    (tmp_path / "again").touch()
    done = subprocess.run([*command, *names, "--continue"], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [(line["kind"], line["section"]) for line in journal.lines()]
    assert kinds.count(("start", "later")) == 1, "what had ended well was run again"
    assert {name: section.status for name, section in journal.read().items()} == dict.fromkeys(
        ("later", "waiting", "last"), "ok"
    )
    assert kinds.count(("again", "waiting")) == 1
    befores = [line for line in journal.lines() if line.get("key") == "before" and line.get("status") == "ok"]
    assert len(befores) == 1, "a check that had ended well was run again"


def rows(journal: Journal, section: str) -> dict[str, Any]:
    found = journal.read()
    return found[section].by_key if section in found else {}


def _published(folder: Path, section: str) -> str:
    """What gpu.json, which is written every few seconds, says of a section."""
    path = folder / "gpu.json"
    return json.loads(path.read_text())["sections"].get(section, {}).get("status", "") if path.is_file() else ""


def _wait(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


def test_terminated_in_order(tmp_path: Path) -> None:
    """SIGTERM: what was under way is told, and the report is written."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu", *OPTIONS, "--out", str(tmp_path), "--sections", "waiting"]
    journal = Journal(tmp_path / "gpu.jsonl")
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        _wait(lambda: "waits" in rows(journal, "waiting"))
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert "waiting: unfinished" in result["failures"]


def test_time_that_is_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section past its time is stopped; one for which none is left is skipped, and both say so."""
    monkeypatch.setattr(gpu_runner, "LEAST_STAGE_SECONDS", 3.0)
    monkeypatch.setattr(gpu_runner, "GRACE_SECONDS", 5.0)
    code = gpu.main([*OPTIONS, "--out", str(tmp_path), "--sections", "waiting,last", "--seconds", "12"])
    assert code == 1
    found = Journal(tmp_path / "gpu.jsonl").read()
    assert "not reached" in found["waiting"].status or "failed" in found["waiting"].status
    assert found["last"].status.startswith("skipped: ")
    assert found["last"].status.endswith(" s were left")
    assert any(line.startswith("last: skipped") for line in failures(found))


def test_unknown_sections_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*OPTIONS, "--sections", "later,none"]) == 2
    assert "error: no section none; there are raising, " in capsys.readouterr().err


def test_what_supervises_imports_no_torch() -> None:
    """An import that fails or hangs must not take the report with it."""
    code = "import sys, benchmarks.gpu, benchmarks.gpu_sections; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_hands_options_on() -> None:
    command = ["make", "-n", "gpu", "PYTHON=python3", "GPU_ARGS=--sections cuda,head --seconds 300"]
    # Called by a make of its own, as in `make test`, it would say which folder it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "python3 -m benchmarks.gpu --sections cuda,head --seconds 300\n"
