"""Runs of a sweep share their references, go on where they were killed, and are compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config.sweep import load_sweep
from engine.errors import UserError
from engine.sweep import sweep
from engine.train.loop import train
from tests.engine.distributed.launch import launch

FILE = """
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{dataset_name: {pairs}, eval_dataset_name: {pairs}, eval_dataset_split: train}}
packing: {{pairs_per_step: 6, tokens_per_pack: 400}}
optim: {{learning_rate: 2.0e-3}}
reference: {{store: {folder}/store}}
train: {{output_dir: {folder}/runs, max_steps: 3, save_steps: 1, report_to: []}}
sweep: {{loss.beta: [0.1, 0.5], loss.loss_type: [sigmoid, ipo]}}
"""


@pytest.fixture
def sweep_file(tmp_path, tiny_model_dir, pairs_jsonl):
    def write(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        path = folder / "sweep.yaml"
        path.write_text(FILE.format(model=tiny_model_dir, pairs=pairs_jsonl, folder=folder))
        return path

    return write


def weights(page: Path) -> dict[str, dict]:
    return {path.parent.name: load_file(path) for path in sorted(page.parent.glob("*/model.safetensors"))}


def test_runs_share_references_and_are_those_that_were_trained_alone(sweep_file, tmp_path, monkeypatch):
    references = sys.modules["engine.reference.precompute"]
    passes, inner = [], references._run
    monkeypatch.setattr(references, "_run", lambda *a, **k: (passes.append(1), inner(*a, **k))[1])
    runs = load_sweep(sweep_file("a"))
    page = sweep(runs)
    assert len(passes) == 1
    assert page == tmp_path / "a" / "runs" / "comparison.html"
    text = page.read_text()
    assert "<code>loss.beta</code>" in text
    found = weights(page)
    assert list(found) == sorted(run.name for run in runs)
    alone = load_sweep(sweep_file("b"))[3].config
    train(alone)
    expected = load_file(Path(alone.train.output_dir) / "model.safetensors")
    assert all((found[runs[3].name][key] == value).all() for key, value in expected.items())
    # Again: nothing is left to do, nothing is written anew.
    times = [path.stat().st_mtime_ns for path in page.parent.glob("*/model.safetensors")]
    assert sweep(runs) == page
    assert [path.stat().st_mtime_ns for path in page.parent.glob("*/model.safetensors")] == times


def test_a_killed_sweep_goes_on(sweep_file):
    path = sweep_file("killed")
    command = [sys.executable, "-m", "engine", "sweep", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = path.parent / "runs" / "beta=0.1,loss_type=ipo" / "checkpoint-1"
    while process.poll() is None and not second.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("comparison.html") == 1
    whole = weights(sweep(load_sweep(sweep_file("whole"))))
    found = weights(Path(done.stdout.splitlines()[-1]))
    assert list(found) == list(whole)
    for name, tensors in whole.items():
        assert all((found[name][key] == value).all() for key, value in tensors.items()), name


def test_processes_train_the_runs_of_a_sweep_together(sweep_file):
    path = sweep_file("together")
    text = path.read_text().replace("loss.beta: [0.1, 0.5], ", "").replace("max_steps: 3", "max_steps: 2")
    path.write_text(text)
    first, second = launch([["-m", "engine", "sweep", str(path)]] * 2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    page = path.parent / "runs" / "comparison.html"
    assert first.out.splitlines()[-1] == str(page)
    assert str(page) not in second.out
    alone = path.parent / "alone.yaml"
    alone.write_text(text.replace(f"{path.parent}/runs", f"{path.parent}/alone"))
    found, expected = weights(page), weights(sweep(load_sweep(alone)))
    assert list(found) == list(expected) == ["loss_type=ipo", "loss_type=sigmoid"]
    for name, tensors in expected.items():
        for key, value in tensors.items():
            torch.testing.assert_close(found[name][key], value, rtol=0, atol=1e-5, msg=f"{name} {key}")


def test_a_wrong_run_is_named_before_the_first_one_is_trained(sweep_file):
    path = sweep_file("wrong")
    path.write_text(path.read_text().replace("loss.beta: [0.1, 0.5]", "optim.optimizer: [adamw, adamw_8bit]"))
    runs = load_sweep(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError, match="run optimizer=adamw_8bit,loss_type=sigmoid: "):
            sweep(runs)
    assert not (path.parent / "runs").exists()
