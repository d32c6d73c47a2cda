"""A run that was killed ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.config import load_config, to_yaml
from engine.errors import UserError
from engine.train.checkpoint import complete_checkpoints
from engine.train.durable import only_writer
from engine.train.loop import train
from engine.train.metrics import JsonlTracker

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from engine.config import load_config
from engine.train import setup
from engine.train.durable import only_writer
from engine.train.loop import train
from engine.train.metrics import JsonlTracker
setup.measure_matmul_rate = lambda device, dtype: 1e12
train(load_config(sys.argv[1]), resume="--resume" in sys.argv)
"""
PERF = "perf/"


def run_files(run: Path) -> dict[str, bytes]:
    """The final weights, and the metrics apart from speeds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith(PERF)} for row in rows]
    weights = {p.name: p.read_bytes() for p in run.glob("*.safetensors")}
    assert weights
    return {**weights, "metrics": json.dumps(kept).encode()}


def start(config, folder: Path, *arguments: str, **options) -> subprocess.Popen:
    path = folder / "run.yaml"
    path.write_text(to_yaml(config))
    command = [sys.executable, "-c", SCRIPT, str(path), *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, **quiet, **options)


def wait_for_rows(run: Path, count: int, process: subprocess.Popen) -> None:
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, rows: int) -> Iterator[None]:
    """Stop a run in this process, as Ctrl-C does, after some rows of metrics."""
    log, seen = JsonlTracker.log, []

    def counted(tracker, step, values):
        log(tracker, step, values)
        seen.append(step)
        if len(seen) == rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTracker, "log", counted)
        yield


def test_a_killed_run_resumes_to_the_same_bits(make_config, tmp_path):
    settings = {"num_train_epochs": 6, "save_steps": 5, "save_total_limit": 2, "logging_steps": 2}
    train(make_config(train={**settings, "output_dir": str(tmp_path / "whole")}))
    killed = make_config(train={**settings, "output_dir": str(tmp_path / "killed")})
    process = start(killed, tmp_path)
    wait_for_rows(tmp_path / "killed", 6, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [step for step, _ in complete_checkpoints(tmp_path / "killed")]
    assert done
    assert max(done) < 24
    result = train(killed, resume=True)
    assert result.resumed_from == max(done)
    assert run_files(tmp_path / "killed") == run_files(tmp_path / "whole")
    assert len(complete_checkpoints(tmp_path / "killed")) == 2


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"lora": {"r": 4, "dropout": 0.3}}},
        {"model": {"dtype": "bfloat16"}, "loss": {"loss_type": "aot"}},
        {"optim": {"optimizer": "rmsprop", "lr_scheduler_type": "cosine", "warmup_steps": 3, "learning_rate": 1e-4}},
    ],
    ids=["lora with dropout", "bfloat16 and coupled pairs", "rmsprop"],
)
def test_an_interrupted_run_resumes_to_the_same_bits(sections, make_config, tmp_path, monkeypatch):
    settings = {"num_train_epochs": 3, "save_steps": 5, "logging_steps": 2}
    train(make_config(**sections, train={**settings, "output_dir": str(tmp_path / "whole")}))
    config = make_config(**sections, train={**settings, "output_dir": str(tmp_path / "stopped")})
    with interrupted_after(monkeypatch, rows=4), pytest.raises(KeyboardInterrupt):
        train(config)
    assert train(config, resume=True).resumed_from == 5
    assert run_files(tmp_path / "stopped") == run_files(tmp_path / "whole")


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(make_config, tmp_path, monkeypatch):
    train(make_config(train={"output_dir": str(tmp_path / "whole")}))
    config = make_config(train={"output_dir": str(tmp_path / "stopped")})
    with interrupted_after(monkeypatch, rows=2), pytest.raises(KeyboardInterrupt):
        train(config)
    with pytest.raises(UserError, match=r"already holds a run \(config\.yaml\).*--resume"):
        train(config)
    assert train(config, resume=True).resumed_from is None
    assert run_files(tmp_path / "stopped") == run_files(tmp_path / "whole")


def test_every_checkpoint_resumes_to_the_same_bits(make_config, tmp_path):
    config = make_config(train={"num_train_epochs": 2, "save_steps": 1, "logging_steps": 3})
    run = tmp_path / "run"
    train(config)
    expected = run_files(run)
    checkpoints = complete_checkpoints(run)
    assert [step for step, _ in checkpoints] == list(range(1, 9))
    for step, _ in reversed(checkpoints):
        (run / "manifest.json").unlink()
        for later in range(step + 1, 9):
            shutil.rmtree(run / f"checkpoint-{later}", ignore_errors=True)
        assert train(config, resume=True).resumed_from == step
        assert run_files(run) == expected


def test_a_finished_run_is_left_alone(make_config, tmp_path):
    config = make_config(train={"save_steps": 2})
    train(config)
    before = run_files(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("edited by its owner")
    result = train(config, resume=True)
    assert result.steps == 4
    assert result.metrics["loss"] > 0
    assert run_files(tmp_path / "run") == before
    assert (tmp_path / "run" / "README.md").read_text() == "edited by its owner"


def test_two_processes_do_not_share_a_run_folder(make_config, tmp_path):
    config = make_config()
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"), pytest.raises(UserError, match=r"run is in use by another training process"):
        train(config)
    assert train(config).steps == 4


def test_resume_in_an_empty_folder_starts_a_run(make_config, tmp_path):
    assert train(make_config(), resume=True).steps == 4


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "learning_rate", 1e-4), ("loss", "beta", 0.2), ("packing", "pairs_per_step", 4), ("train", "seed", 7)],
)
def test_a_setting_that_changes_the_training_is_named(section, key, value, make_config, tmp_path):
    config = make_config(train={"save_steps": 2})
    train(config)
    changed = make_config(**{"train": {"save_steps": 2}, section: {key: value}})
    with pytest.raises(UserError, match=rf"{section}\.{key} was .* and is now {value}.*changes the training"):
        train(changed, resume=True)


def test_settings_that_change_nothing_learned_may_change(make_config, tmp_path):
    config = make_config(train={"save_steps": 2})
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    other = make_config(packing={"tokens_per_pack": 800}, train={"save_steps": 3, "logging_steps": 2})
    assert train(other, resume=True).resumed_from == 2


def test_changed_data_is_refused(make_config, pairs_jsonl, tmp_path):
    data = tmp_path / "pairs.jsonl"
    shutil.copy(pairs_jsonl, data)
    config = make_config(data={"dataset_name": str(data)}, train={"save_steps": 2})
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    data.write_text(data.read_text().replace("yes", "sure", 1))
    with pytest.raises(UserError, match=r"training data is not what it was"):
        train(config, resume=True)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_changed_starting_model_is_refused(lora, make_config, tiny_model_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = make_config(model={"model_name_or_path": str(base), "lora": lora}, train={"save_steps": 2})
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    weights = load_file(base / "model.safetensors")
    save_file({n: w + 0.01 for n, w in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model_name_or_path=.*base holds other weights than when the run began"):
        train(config, resume=True)


def test_a_damaged_checkpoint_is_named_and_an_incomplete_one_is_passed_over(make_config, tmp_path):
    config = make_config(train={"save_steps": 1})
    run = tmp_path / "run"
    train(config)
    expected = run_files(run)
    (run / "manifest.json").unlink()
    weights = run / "checkpoint-4" / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"optimizer\.safetensors is damaged.*delete .*checkpoint-4"):
        train(config, resume=True)
    weights.write_bytes(content[:-5])
    assert train(config, resume=True).resumed_from == 3
    assert run_files(run) == expected


def _limit_file_size(size: int):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_disk_that_fills_up_stops_the_run_and_it_resumes(make_config, tmp_path):
    settings = {"save_steps": 2, "num_train_epochs": 2}
    train(make_config(train={**settings, "output_dir": str(tmp_path / "whole")}))
    config = make_config(train={**settings, "output_dir": str(tmp_path / "full")})
    process = start(config, tmp_path, preexec_fn=_limit_file_size(100_000))
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "UserError: cannot write" in errors.decode()
    assert "checkpoint-2: the file is larger than this system allows; free space" in errors.decode()
    assert not complete_checkpoints(tmp_path / "full")
    assert not [p.name for p in (tmp_path / "full").iterdir() if "incomplete" in p.name]
    train(config, resume=True)
    assert run_files(tmp_path / "full") == run_files(tmp_path / "whole")


def test_a_full_disk_at_the_very_end_leaves_no_half_model(make_config, tmp_path, monkeypatch):
    config = make_config(train={"save_steps": 3})
    replace_file = os.replace

    def full(source, target):
        if str(target).endswith("run/model.safetensors"):
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        train(config)
    run = tmp_path / "run"
    assert not (run / "config.json").exists()
    assert not (run / "model.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
    assert train(config, resume=True).resumed_from == 3
    assert (run / "model.safetensors").exists()


def test_old_checkpoints_go_only_when_the_next_one_is_there(make_config, tmp_path, monkeypatch):
    config = make_config(train={"save_steps": 1, "save_total_limit": 1})
    from engine.train import checkpoint

    save, seen = checkpoint.save_checkpoint, []

    def spy(output_dir, **arguments):
        seen.append([step for step, _ in complete_checkpoints(output_dir)])
        return save(output_dir, **arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", spy)
    train(config)
    assert seen == [[], [1], [2], [3]]
    assert [step for step, _ in complete_checkpoints(tmp_path / "run")] == [4]


def test_the_written_configuration_is_the_one_that_ran(make_config, tmp_path):
    config = make_config()
    train(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    other = replace(config, train=replace(config.train, output_dir=str(tmp_path / "run" / "metrics.jsonl")))
    with pytest.raises(UserError, match="is a file: give a folder"):
        train(other)
