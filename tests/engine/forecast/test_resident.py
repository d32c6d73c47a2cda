"""What a forecast takes for the process beside its tensors, by measures that other processes do not move."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import to_yaml
from engine.config.schema import ReferenceConfig

CHILD = """
import json, sys
from pathlib import Path
import torch
from engine.config import load_config
from engine.forecast.resident import resident_bytes
from tests.engine.forecast.blocks import anonymous

def libraries():
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    return sum(Path(path).stat().st_size for path in paths if Path(path).exists())

config = load_config(sys.argv[1])
resident = resident_bytes(config, torch.device("cpu"))
found = {"resident": resident, "anonymous": anonymous(), "libraries": libraries()}
from engine.train import loop, setup
from engine.train import run as run_module
setup.measure_matmul_rate = lambda device, dtype: 1e12
log = run_module.Run._log
peak = []
def observed(run, *arguments):
    log(run, *arguments)
    peak.append(anonymous())
run_module.Run._log = observed
loop.train(config)
print(json.dumps(found | {"anonymous of a run": max(peak), "libraries of a run": libraries()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_adds_little_to_the_process(config, tmp_path):
    """Memory that no file holds, and the libraries that are loaded: a tiny run after the forecast's tiny step."""
    train = replace(config.train, output_dir=str(tmp_path / "run"), max_steps=2, logging_steps=1, report_to=())
    config = replace(config, train=train, reference=ReferenceConfig(store=str(tmp_path / "store")))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run.yaml")]
    root = Path(__file__).resolve().parents[3]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["anonymous"] <= found["resident"] * 1.02
    assert found["anonymous of a run"] - found["anonymous"] <= 0.1 * found["resident"]
    assert found["libraries of a run"] <= 1.05 * found["libraries"]
