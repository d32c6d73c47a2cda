"""``python -m benchmarks.gpu``: the whole script on the CPU, and what it makes of failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_report import TARGETS, compare_targets, failures, page, publish

ROOT = Path(__file__).resolve().parents[2]


def test_dry_run(tmp_path: Path) -> None:
    """From a plain checkout, in a folder that is not it: every section runs, every check passes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert [result[name]["status"] for name in gpu.SECTIONS] == ["ok"] * len(gpu.SECTIONS)
    assert result["failures"] == []
    checks = result["checks"]
    assert len(checks["rows"]) == checks["expected"] > 20
    assert all(row["ok"] for row in checks["rows"])
    measured = {(row["inputs"], row["contender"]) for row in result["head"]["rows"] if "ms" in row}
    assert {("real", "ours: linear_dpo_loss"), ("random", "ours: linear_logps")} <= measured
    assert result["training"]["steps"] == 6
    assert result["training"]["perf/tokens_per_second"] > 0
    for name in ("gpu.md", "gpu.log", "head.png", "profile.txt"):
        assert (tmp_path / "results" / name).stat().st_size > 0
    for target in TARGETS:
        assert target.name in done.stdout
    assert {line["verdict"] for line in result["targets"]} == {"dry run"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A section that fails is reported and recorded, and the exit code is 1."""
    assert gpu.main(["--section", "environment", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "environment: failed: torch sees no CUDA device; --dry-run runs the same on the CPU" in printed
    assert "not measured" in printed
    assert json.loads((tmp_path / "gpu.json").read_text())["environment"]["status"].startswith("failed")


def test_a_hang_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section past its time is stopped; its rows so far stay."""
    record = tmp_path / "head.json"
    record.write_text(json.dumps({"rows": [1, 2]}))

    def hang(command, **kwargs):
        raise subprocess.TimeoutExpired(command, kwargs["timeout"], output=b"so far", stderr=b"")

    monkeypatch.setattr(gpu.subprocess, "run", hang)
    found = gpu._run_section("head", tmp_path, tmp_path, 3.0, dry_run=True)
    assert found["status"] == "failed: not done after 3 s"
    assert found["rows"] == [1, 2]
    assert found["log"] == "so far"


def our_rows(ms: float) -> list[dict]:
    errors = {"token error": 1e-4, "response error": 0.01, "dX error": 0.01, "dW error": 0.03}
    rows = []
    for target in TARGETS:
        common = {"inputs": "real", "task": target.task, **errors}
        rows.append(common | {"contender": target.contender, "ms": ms, "x own floor": 1.25, "extra MiB": 200.0})
        rows.append(common | {"contender": "naive logits", "dW error": 0.01})
    return rows


def test_targets_line_by_line() -> None:
    lines = {line["target"]: line for line in compare_targets(our_rows(30.0), dry_run=False)}
    assert len(lines) == len(TARGETS) == 11
    assert lines["linear_dpo_loss, 3G, ms"]["verdict"] == "met"
    assert lines["linear_dpo_loss, 3G, ms"]["bare products, ms"] == 24.0
    assert lines["loss with frozen head, 2G, ms"]["verdict"] == "missed"
    assert lines["gradients of 3G, error over torch's"]["measured"] == pytest.approx(3.0)
    assert lines["gradients of 3G, error over torch's"]["verdict"] == "missed"
    assert all(line["verdict"] == "not measured" for line in compare_targets([], dry_run=False))


def test_every_failure_is_named(tmp_path: Path) -> None:
    found = {
        "checks": {
            "status": "ok",
            "seconds": 1.0,
            "expected": 3,
            "rows": [
                {"number": 0, "check": "kernel a x", "ok": True, "value": 1.0, "bound": 2.0},
                {"number": 1, "check": "kernel b x", "ok": False, "value": 3.0, "bound": 2.0},
                {"number": 2, "check": "kernel c x", "ok": False, "error": "RuntimeError: no", "bound": 0.0},
            ],
        },
        "attention": {
            "status": "ok",
            "seconds": 1.0,
            "rows": [{"model": "llama", "backend": "varlen", "ok": False}, {"model": "llama", "backend": "flash"}],
        },
        "training": {"status": "skipped: no engine", "seconds": 1.0},
        "profile": {"status": "failed: not done after 60 s", "seconds": 60.0},
    }
    lines = failures(found)
    assert lines == [
        "profile: failed: not done after 60 s",
        "check kernel b x: 3, at most 2 allowed",
        "check kernel c x: RuntimeError: no",
        "attention backend varlen (llama): not equal to SDPA per segment",
    ]
    text = page(found, compare_targets([], dry_run=False), lines)
    assert "1 of 3 passed" in text
    assert "Nothing: skipped: no engine." in text
    (tmp_path / "work").mkdir()
    assert publish(found, tmp_path / "work", tmp_path / "out", dry_run=True) == 1
    assert (tmp_path / "out" / "gpu.md").is_file()
