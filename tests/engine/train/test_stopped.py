"""A run that is asked to end loses nothing: what it goes on to is what it would have become."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from engine import cli
from engine.config import to_yaml
from engine.durable import is_complete
from engine.reference import ReferenceStore
from engine.train import run as run_module
from engine.train.checkpoint import newest_checkpoint
from engine.train.optimizer import GuardedUpdate
from tests.engine.kills.evidence import compare, leavings

pytestmark = pytest.mark.usefixtures("ctrl_c_is_heard")

SECTIONS = {
    "train": {"save_steps": 2, "save_total_limit": 1, "eval_steps": 2, "logging_steps": 3, "num_train_epochs": 2},
}


@pytest.fixture
def run_file(make_config, pairs_jsonl, tmp_path):
    """Writes the configuration of a run into ``tmp_path/NAME/run`` and gives its path."""

    def write(name: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        train = SECTIONS["train"] | {"output_dir": str(place / "run")}
        evaluation = {"eval_dataset_name": str(pairs_jsonl), "eval_dataset_split": "train"}
        config = make_config(train=train, data=evaluation, model={"lora": {"r": 2, "dropout": 0.2}})
        (place / "run.yaml").write_text(to_yaml(config))
        return place / "run.yaml"

    return write


def signal_at(monkeypatch, owner, name: str, nth: int, number: int) -> None:
    """Send this process a signal when ``owner.name`` is called for the n-th time, before it does anything."""
    inner, calls = getattr(owner, name), []

    def watched(*arguments, **options):
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return inner(*arguments, **options)

    monkeypatch.setattr(owner, name, watched)


@pytest.fixture
def whole(run_file):
    """What a run leaves that nobody stops."""
    path = run_file("whole")
    assert cli.main(["train", str(path)]) == 0
    return leavings(path.parent)


MOMENTS = {
    "in the first step": (GuardedUpdate, "step", 1, "after step 1 of 8", 1),
    "in a step": (GuardedUpdate, "step", 3, "after step 3 of 8", 3),
    "in a step that is saved": (GuardedUpdate, "step", 4, "after step 4 of 8", 4),
    "in an evaluation": (run_module, "evaluate_splits", 2, "after step 4 of 8", 4),
    "in a checkpoint": (run_module.Run, "_save", 2, "after step 4 of 8", 4),
    "in the last evaluation": (run_module, "evaluate_splits", 4, "after step 8 of 8", 8),
    "before a step": (run_module.Run, "_open", 1, "before step 1", None),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_goes_on_ends_with_the_same_bits(moment, run_file, whole, monkeypatch, capsys):
    owner, name, nth, said, step = MOMENTS[moment]
    path = run_file("stopped")
    run = path.parent / "run"
    with monkeypatch.context() as context:
        signal_at(context, owner, name, nth, signal.SIGTERM)
        assert cli.main(["train", str(path)]) == 75
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"stopped by SIGTERM {said}: go on with --resume"
    found = newest_checkpoint(run)
    assert (found and found[0]) == step
    assert found is None or is_complete(found[1])
    assert cli.main(["train", str(path), "--resume"]) == 0
    compare(leavings(path.parent), whole)


def test_a_run_that_is_stopped_again_and_again_keeps_one_such_checkpoint(run_file, whole, monkeypatch):
    path = run_file("stopped")
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as context:
            signal_at(context, GuardedUpdate, "step", 1, number)
            assert cli.main(["train", str(path), "--resume"]) == (130 if number == signal.SIGINT else 75)
    names = sorted(p.name for p in (path.parent / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3-stopped"]
    assert cli.main(["train", str(path), "--resume"]) == 0
    compare(leavings(path.parent), whole)


def test_a_model_that_is_being_written_is_finished(run_file, whole, monkeypatch):
    path = run_file("stopped")
    signal_at(monkeypatch, run_module, "export_model", 1, signal.SIGTERM)
    assert cli.main(["train", str(path)]) == 0
    compare(leavings(path.parent), whole)


def test_a_checkpoint_that_a_killed_run_had_not_yet_deleted_goes(run_file, whole, monkeypatch):
    path = run_file("stopped")
    inner = run_module.checkpoints.prune_checkpoints

    def killed(output_dir, limit, **options):
        if newest_checkpoint(output_dir)[0] == 8:
            raise KeyboardInterrupt
        inner(output_dir, limit, **options)

    with monkeypatch.context() as context:
        context.setattr(
            run_module.checkpoints, "prune_checkpoints", lambda *a, **o: newest_checkpoint(a[0]) and killed(*a, **o)
        )
        assert cli.main(["train", str(path)]) == 130
    assert sorted(p.name for p in (path.parent / "run").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert cli.main(["train", str(path), "--resume"]) == 0
    compare(leavings(path.parent), whole)


def test_a_pass_over_references_stores_what_it_has(run_file, tmp_path, monkeypatch, capsys):
    path, store = run_file("run"), tmp_path / "store"
    command = ["precompute", str(path), "--reference.store", str(store), "--packing.tokens_per_pack", "300"]
    with monkeypatch.context() as context:
        signal_at(context, sys.modules["engine.reference.precompute"], "_split", 3, signal.SIGTERM)
        assert cli.main(command) == 75
    printed = capsys.readouterr()
    assert "stopped by SIGTERM: run the same command again to go on" in printed.err.splitlines()
    stored = len(ReferenceStore(store))
    assert stored > 0
    assert cli.main(command) == 0
    assert "train: 24 rows reused" not in capsys.readouterr().out
    assert len(ReferenceStore(store)) > stored


def test_a_request_while_references_are_stored_loses_none(run_file, tmp_path, monkeypatch, capsys):
    command = ["precompute", str(run_file("run")), "--reference.store", str(tmp_path / "store")]
    with monkeypatch.context() as context:
        signal_at(context, ReferenceStore, "add", 1, signal.SIGTERM)
        # All is done by then.
        assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "train: 24 rows reused" in capsys.readouterr().out
