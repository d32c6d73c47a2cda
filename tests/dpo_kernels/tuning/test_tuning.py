"""The tuner: its command, its list of problems, what compilation leaves out, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia.compiler")

from dpo_kernels.kernels.tile_config import TileConfig, TileTableError, read_table, table_entries
from dpo_kernels.tuning import candidates, command, table
from dpo_kernels.tuning.errors import TuningError
from dpo_kernels.tuning.problems import Problem, problem_groups
from dpo_kernels.tuning.search import Result

ROOT = Path(__file__).resolve().parents[3]
LLAMA = Problem("slice_grad", torch.bfloat16, 8192, 4096, 10240, False)
GOOD = TileConfig(block_n=128, block_v=128, block_d=64, group_n=8, num_warps=8, num_stages=3, tma=True)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], env=everything, capture_output=True, text=True, check=False)


USE = """
import torch
from dpo_kernels import linear_logps
from dpo_kernels.kernels.tile_config import tile_config
config = tile_config("linear_stats", arch="cpu", dtype=torch.float32, D=32, V=96, heavy=False, aligned=True)
assert config.block_d == 16, config
torch.manual_seed(0)
hidden, weight, labels = torch.randn(20, 32), torch.randn(96, 32), torch.randint(96, (20,))
runs = [linear_logps(hidden, weight, labels, impl="triton") for _ in range(2)]
assert torch.equal(*runs)
exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
assert (runs[0] - exact).abs().max() < 1e-5
"""


def test_dry_run_from_the_command_to_a_table_in_use(tmp_path: Path):
    """`dpo bench tune` on the CPU: every kernel is checked and timed, and what is written is what launches take."""
    path = tmp_path / "new folder" / "tiles.json"
    done = run("-m", "engine", "bench", "tune", "--dry-run", "--dtype", "float32", "--output", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in command.KERNELS:
        assert f"{kernel} float32 N=24 D=32 V=96: " in done.stdout
        assert f"| {kernel} | 32 | 96 | - | - | - | " in done.stdout
    assert f"to use it: DPO_TILE_CONFIGS={path}" in done.stdout
    assert "WRONG" not in done.stdout
    assert "no gain" in done.stdout
    assert "RuntimeWarning" not in done.stderr
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    # Times of an interpreter say little: make sure of an entry.
    entry = table_entry(TileConfig(block_n=16, block_v=32, block_d=16, group_n=1, num_warps=4, num_stages=1))
    content = json.loads(path.read_text())
    assert set(content["archs"]["cpu"]) == set(command.KERNELS)
    content["archs"]["cpu"]["linear_stats"]["float32"] = [entry]
    path.write_text(json.dumps(content))
    used = run("-c", USE, TRITON_INTERPRET="1", DPO_TILE_CONFIGS=str(path))
    assert used.returncode == 0, used.stdout + used.stderr


def table_entry(config: TileConfig) -> dict:
    bounds = {"min_D": 17, "max_D": 32, "min_V": 65, "max_V": 128, "heavy": False, "aligned": True}
    return {"bounds": bounds, "config": vars(config)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", [("engine", "bench", "tune"), ("dpo_kernels.tuning",)])
def test_without_a_device(module, tmp_path):
    done = run("-m", *module, "--output", str(tmp_path / "tiles.json"), TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert done.stderr == (
        "error: tuning needs an NVIDIA GPU, and torch sees none here; --dry-run shows the steps on the CPU\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-size", "64"], "--hidden-size and --vocab-size go together"),
        (["--rows", "0"], "must be at least 1, got 0"),
        (["--rows", "x"], "argument --rows: must be a whole number, got x"),
        (["--kernels", "linear"], "invalid choice: 'linear'"),
        (["--hidden", "64"], "unrecognized arguments: --hidden 64; see `dpo bench tune --help`"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(TuningError, match=message):
        command.run(arguments, prog="dpo bench tune")


def test_every_dense_kernel_of_the_tables_is_tuned():
    """What a filter leaves to do depends on the data, so that its kernels keep the shipped tiles."""
    assert set(command.KERNELS) == {name for name in table_entries("default") if not name.startswith("filtered_")}


def test_problems_are_the_launches_of_the_ops():
    groups = problem_groups(command.KERNELS, [(4096, 128256)], dtype=torch.bfloat16, rows=8192, heavy=False)
    found = {(p.kernel, p.T, p.D, p.V) for group in groups for p in group}
    assert ("linear_stats", 8192, 4096, 128256) in found
    assert LLAMA in [p for group in groups for p in group]
    assert ("linear_exps", 8192, 4096, 10240) in found
    chunk = next(N for kernel, N, _, V in found if kernel == "linear_exps" and V == 128256)
    assert 4096 <= chunk < 8192
    assert len(groups) == len(found) == 4


def test_shapes_of_one_bucket_are_tuned_together():
    shapes = [(3584, 152064), (2304, 256000), (4096, 128256), (50, 7)]
    groups = problem_groups(["linear_stats"], shapes, dtype=torch.bfloat16, rows=64, heavy=True)
    assert [[(p.D, p.V) for p in group] for group in groups] == [shapes[:2], shapes[2:3], shapes[3:]]
    for group in groups:
        for problem in group:
            bounds = dict(problem.bounds())
            assert bounds["min_D"] <= problem.D <= bounds["max_D"] < 2 * bounds["min_D"]
            assert bounds["min_V"] <= problem.V <= bounds["max_V"] < 2 * bounds["min_V"]
            assert bounds["heavy"]
    assert dict(groups[0][0].bounds())["aligned"]
    assert not dict(groups[-1][0].bounds())["aligned"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_list_of_candidates(arch, dtype):
    found = candidates.candidates(Problem("slice_grad", dtype, 8192, 4096, 10240, False), arch)
    assert 20 <= len(found) == len(set(found)) <= 64
    assert all(config.tma == (arch in ("sm_90", "sm_100")) for config in found)
    assert all(n.block_n == GOOD.block_n and n != GOOD for n in candidates.neighbours(GOOD))


def test_compilation_prunes():
    """On sm_90: a tile that fits, one that asks for too much shared memory, one whose sums do not fit in registers."""
    large = TileConfig(block_n=128, block_v=256, block_d=128, group_n=8, num_warps=8, num_stages=3, tma=True)
    spilling = TileConfig(block_n=128, block_v=256, block_d=32, group_n=8, num_warps=4, num_stages=2, tma=True)
    kept, flaws = candidates.prune(LLAMA, [GOOD, large, spilling], "sm_90")
    assert kept == [GOOD]
    assert flaws == {"too much shared memory": 1, "spilled registers": 1}


def result(problem: Problem, config: TileConfig, *, tuned: bool = True) -> Result:
    return Result([problem], [GOOD], config, tuned, [2.0], [1.0], 3, {})


@pytest.fixture
def without_device(monkeypatch):
    monkeypatch.setattr("dpo_kernels.tuning.search.machine_name", lambda: "no device")


@pytest.mark.usefixtures("without_device")
def test_entries_replace_each_other_and_leave_others_alone(tmp_path):
    path = tmp_path / "tiles.json"
    other = Problem("slice_grad", torch.bfloat16, 8192, 1024, 10240, False)
    narrow = TileConfig(block_n=64, block_v=128, block_d=64, group_n=8, num_warps=4, num_stages=3)
    for problem, config in ((LLAMA, GOOD), (other, GOOD), (LLAMA, narrow)):
        table.write_entry(path, "sm_90", result(problem, config))
    table.write_entry(path, "sm_80", result(LLAMA, narrow))
    entries = read_table(path)
    found = {bounds["max_D"]: config for bounds, config in entries["sm_90"]["slice_grad"]["bfloat16"]}
    assert found == {4096: narrow, 1024: GOOD}
    assert len(entries["sm_80"]["slice_grad"]["bfloat16"]) == 1
    # The shipped configuration is the fastest now: no entry, whatever was there.
    table.write_entry(path, "sm_90", result(LLAMA, GOOD, tuned=False))
    assert [bounds["max_D"] for bounds, _ in read_table(path)["sm_90"]["slice_grad"]["bfloat16"]] == [1024]


@pytest.mark.usefixtures("without_device")
def test_a_write_that_is_interrupted_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    table.write_entry(path, "sm_90", result(LLAMA, GOOD))
    before = path.read_text()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(table.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        table.write_entry(path, "sm_80", result(LLAMA, GOOD))
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_table_that_cannot_be_written_is_named_first(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "tiles.json"):
        with pytest.raises(TuningError, match=r"name (one|another file) with --output"):
            table.check_writable(path)
    with pytest.raises(TileTableError, match="file: is not JSON"):
        table.check_writable(tmp_path / "file")
