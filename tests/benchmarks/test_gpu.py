"""``python -m benchmarks.gpu``: the whole script on the CPU, and the report that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import gpu_ways
from benchmarks.gpu_cuda import find_sanitizer, read_sanitizer
from benchmarks.gpu_journal import Found, Journal
from benchmarks.gpu_report import TARGETS, compare_targets, failures, page
from benchmarks.gpu_sections import SECTIONS
from benchmarks.gpu_table import Context, SkippedError
from benchmarks.inputs import make_inputs
from benchmarks.shapes import HeadShape

ROOT = Path(__file__).resolve().parents[2]
LACKING = ("datasets", "tyro", "trl", "liger_kernel", "cut_cross_entropy", "flash_attn", "bitsandbytes")
"""What a machine with torch, triton and transformers need not have."""


def run(folder: Path, *options: str, table: str | None = None, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """From a folder that is not the checkout; what gpu.json says."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\n"
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(block)
    paths = os.pathsep.join([str(folder / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", *options, "--out", str(folder / "results")]
    command += ["--table", table] if table else []
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    result = json.loads((folder / "results" / "gpu.json").read_text())
    assert result["failures"] == [], done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
    return result


def check_whole(result: dict[str, Any], folder: Path) -> None:
    """Every section ran, every check passed, and everything that is to be written is."""
    assert set(result["sections"]) == set(SECTIONS)
    for name, section in result["sections"].items():
        assert section["status"] == "ok", name
        assert section["not reached"] == []
        assert len(section["rows"]) > 0, name
    head = result["sections"]["head"]["rows"]
    measured = {(row["inputs"], row["contender"]) for row in head if row.get("ms")}
    assert {("real", "ours: linear_dpo_loss"), ("real", "ours: linear_logps"), ("real", "naive logits")} <= measured
    trained = {row["key"]: row for row in result["sections"]["training"]["rows"]}
    assert trained["dpo train"]["steps"] == 6
    assert trained["steps: full, auto"]["tokens per second"] > 0
    assert {line["verdict"] for line in result["targets"]} == {"dry run"}
    for name in ("gpu.md", "gpu.log", "gpu.jsonl", "profile.txt"):
        assert (folder / "results" / name).stat().st_size > 0
    # As many as a lent machine gives back.
    assert len(list((folder / "results").iterdir())) <= 8
    page = (folder / "results" / "gpu.md").read_text()
    assert all(target.name in page for target in TARGETS)


def test_dry_run(tmp_path: Path) -> None:
    """Every check's code, on tiny sizes, with nothing but what such a machine has."""
    check_whole(run(tmp_path, "--dry-run", "--one-process", without=LACKING), tmp_path)


@pytest.mark.slow
def test_dry_run_in_processes(tmp_path: Path) -> None:
    """As on a card: a process for each shard of each section; with the peers that are installed."""
    check_whole(run(tmp_path, "--dry-run"), tmp_path)
    assert (tmp_path / "results" / "head.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_runs_on_cuda_alone(tmp_path: Path) -> None:
    """Streams, graphs, events and memory figures, called as torch's own take it; what they give is the card's part."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--one-process", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--table", "tests.benchmarks.cuda_stand_ins"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = Journal(tmp_path / "gpu.jsonl").read()
    wrong = {row["key"]: row for section in found.values() for row in section.rows if row["status"] != "ok"}
    # A stand-in replays no graph and runs no kernel that the profiler sees.
    of_a_card = ("graph capture", "what nvidia-smi says", "log-probs and gradients: ours")
    assert [key for key in wrong if not key.startswith(of_a_card)] == [], done.stdout + done.stderr
    assert {row["status"].partition(":")[0] for row in wrong.values()} <= {"failed", "skipped"}, wrong
    assert len(found["cuda"].rows) == 4
    assert all(section.missing() == [] for section in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path: Path) -> None:
    """A row that says so, and exit code 1."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--sections", "sizes", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch sees no CUDA device; --dry-run runs the same on the CPU" in done.stdout


PATHS = ("log-probs and gradients", "frozen head", "loss", "statistics", "filter", "weight_grad")
ASKED = {
    "cuda": [
        f"{what}: {path}"
        for what in ("no wait for the device", "two runs, same bits", "graph capture", "side stream", "second device")
        for path in PATHS
    ],
    "options": ["statistics ", "statistics frozen head ", "filter ", "weight_grad ", "vocab-parallel "],
    "sanitizer": [f"{tool}: {path}" for tool in ("memcheck", "racecheck") for path in ("stats", "pairs", "filter")],
    "attention": [
        f"{backend}: qwen3, head dim 128, heads 8:1" for backend in ("flash3", "flash", "varlen", "flex", "sdpa")
    ],
    "flex": ["Gemma 2 9B, global: sdpa", "gpt-oss-20b, global: flex", "Llama 4 Scout, chunks: varlen"],
    "steps": ["full", "LoRA", "gradient checkpointing", "mixture of experts", "K = 3"],
    "blocks": ["0.5B: none", "0.5B: liger", "8B, 4 layers: compile, selective"],
    "ways": [
        "8B: stochastic, adamw_8bit",
        *(
            f"{shape}: {way}"
            for shape in ("0.5B", "8B, 4 layers")
            for way in ("none", "master_weights stochastic", "master_weights kahan", "optim.offload", "kernels liger")
        ),
        *("0.5B: gradient_checkpointing selective", "8B, 4 layers: activation_offload", "0.5B: kernels compile"),
    ],
    "saves": ["saves: async_save", "saves: no checkpoint", "several processes: param_dtype bfloat16"],
    "limits": ["float16, frozen head, slope ", "NaN reaches the hinge loss", "variants over random batches"],
}
"""How checks begin that no list may lose."""


@pytest.mark.parametrize("section", ASKED)
def test_what_is_asked_of_a_card(section: str, tmp_path: Path) -> None:
    context = Context(Journal(tmp_path / "gpu.jsonl"), tmp_path, dry_run=True, quick=False, deadline=0.0)
    names = [check.name for check in SECTIONS[section].checks(context)]
    assert [asked for asked in ASKED[section] if not any(name.startswith(asked) for name in names)] == []


def test_what_does_not_fit_is_skipped_with_what_is_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(Journal(tmp_path / "gpu.jsonl"), tmp_path, dry_run=True, quick=True, deadline=0.0)
    check = next(iter(SECTIONS["ways"].checks(context)))
    monkeypatch.setattr(gpu_ways, "_capacity", lambda context: 2**29)
    with pytest.raises(SkippedError, match=r"^dpo plan forecasts 0\.\d GiB, and the device has 0\.5 GiB$"):
        check.run()


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
    broken = [{**row, "ms": "nan", "dX error": 0.0} for row in our_rows(30.0)]
    assert {line["verdict"] for line in compare_targets(broken, dry_run=True)} == {"dry run", "not measured"}


def test_a_page_of_any_journal(tmp_path: Path) -> None:
    """At whatever line a journal ends, there is a page, and failures name what is open."""
    journal = Journal(tmp_path / "whole.jsonl")
    journal.append("start", "head")
    journal.append("plan", "head", names=["a", "b"])
    journal.append("fact", "head", name="settings", value="N=1")
    journal.append("row", "head", key="a", check="a", number=0, status="running", began=1.0, limit=9.0)
    journal.append(
        "row", "head", key="a | ours", check="a", status="ok", ms=float("inf"), times_ms=[1.0], note="x|y\nz"
    )
    journal.append("row", "head", key="a", check="a", number=0, status="ok", value=1.0, seconds=2.0)
    journal.append("end", "head", status="ok", seconds=3.0)
    text = journal.path.read_bytes()
    part = Journal(tmp_path / "part.jsonl")
    for stop in range(0, len(text), 7):
        part.path.write_bytes(text[:stop])
        found = part.read()
        assert page(found, SECTIONS, compare_targets([], dry_run=False), failures(found)).startswith("# ")
    assert failures({}) == []
    assert failures(journal.read()) == ["head: 1 checks were not reached: b"]
    journal.append("start", "head")
    assert failures(journal.read()) == ["head: unfinished"]


def test_rows_of_a_failed_check_say_why() -> None:
    found = Found(status="1 of 1 rows failed")
    found.by_key["k"] = {"key": "k", "check": "k", "status": "failed", "value": 3.0, "bound": 2.0}
    assert failures({"kernels": found}) == ["kernels: k: failed: 3.0, at most 2.0 allowed"]


class DrawsWhereToldMode(TorchFunctionMode):
    """A generator of another device than the result's is an error on a GPU: whoever draws must name the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None and func.__name__ in ("randn", "rand", "randint", "randperm"):
            assert "device" in kwargs, f"{func.__name__} with a generator draws on the CPU, whatever the generator's"
        return func(*args, **kwargs)


@pytest.mark.parametrize("kind", ["real", "random"])
def test_inputs_are_drawn_where_the_generator_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import inputs

    small = inputs.States(torch.randn(64, 8), torch.randn(40, 8), torch.randint(40, (64,)), "tiny")
    monkeypatch.setattr(inputs, "model_states", lambda count: small)
    with DrawsWhereToldMode():
        make_inputs(kind, HeadShape(64, 16, 100), length=8)


SANITIZER_CLEAN = "========= COMPUTE-SANITIZER\nthe case is done\n========= ERROR SUMMARY: 0 errors\n"
SANITIZER_BAD = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at linear_stats_fwd_kernel+0x1c40
=========     Access to 0x7f is out of bounds
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure"
the case is done
========= ERROR SUMMARY: 3 errors
"""
SANITIZER_RACE = (
    "========= COMPUTE-SANITIZER\nthe case is done\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (SANITIZER_CLEAN, True),
        (SANITIZER_BAD, False),
        (SANITIZER_RACE, False),
        ("the case is done\n", False),
        ("RuntimeError: no device", False),
        ("", False),
    ],
)
def test_the_sanitizers_verdict(text: str, ok: bool) -> None:
    """A run without a summary is no clean run."""
    assert read_sanitizer(text, 1).get("ok") is ok


def test_the_sanitizer_is_found_where_toolkits_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    binary = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    assert find_sanitizer() == str(binary)
