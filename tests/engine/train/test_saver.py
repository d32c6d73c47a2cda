"""Checkpoints that are written beside the steps are those that are written while training waits."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import cli, distributed, mesh
from engine.config import build_config, to_yaml
from engine.durable import check_content
from engine.errors import UserError
from engine.train import checkpoint, host_memory, saver, storage
from engine.train import run as run_module
from engine.train.checkpoint import complete_checkpoints
from engine.train.loop import train
from engine.train.optimizer import GuardedUpdate
from engine.train.saver import Saver
from tests.engine.kills.evidence import compare, leavings
from tests.engine.train.conftest import read_rows
from tests.pretended_cuda import CUDA, on_host, pretended_cuda
from tests.pretended_streams import UnorderedError

LORA = {"r": 4, "dropout": 0.3, "target_modules": ["v_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.4}
CASES = {
    "whole model": {},
    "adapter with copies": {"model": {"lora": LORA}},
    "moving reference": {"reference": MOVING},
    "best": {"train": {"eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 9}},
}


@pytest.fixture
def beside(monkeypatch):
    """Checkpoints are written beside the steps, whatever the configuration says."""
    monkeypatch.setattr(run_module, "saves_beside", lambda *arguments, **options: True)


@pytest.fixture
def late(monkeypatch):
    """A write begins when the step after its own has changed the weights, or nothing is left but to wait for it."""
    due = threading.Event()
    save, step, finish = checkpoint.save_checkpoint, GuardedUpdate.step, Saver.finish
    main = threading.current_thread()

    def saved(*arguments, **options):
        assert threading.current_thread() is main or due.wait(60)
        due.clear()
        return save(*arguments, **options)

    def stepped(*arguments):
        try:
            return step(*arguments)
        finally:
            due.set()

    def finished(writer):
        due.set()
        finish(writer)
        due.clear()

    monkeypatch.setattr(checkpoint, "save_checkpoint", saved)
    monkeypatch.setattr(GuardedUpdate, "step", stepped)
    monkeypatch.setattr(Saver, "finish", finished)


def config_of(make_config, sections: dict, place: Path, pairs: Path):
    options = {"save_steps": 1, "save_total_limit": 2, "output_dir": str(place / "run"), **sections.get("train", {})}
    data = {"eval_dataset_name": str(pairs), "eval_dataset_split": "train"} if "eval_steps" in options else {}
    return make_config(**{**sections, "train": options, "data": data})


@pytest.mark.parametrize("case", CASES)
def test_all_that_a_run_leaves_is_the_same(case, make_config, pairs_jsonl, tmp_path, request):
    train(config_of(make_config, CASES[case], tmp_path / "waits", pairs_jsonl))
    request.getfixturevalue("beside")
    request.getfixturevalue("late")
    train(config_of(make_config, CASES[case], tmp_path / "beside", pairs_jsonl))
    compare(leavings(tmp_path / "beside"), leavings(tmp_path / "waits"))


class LateStream:
    """A CUDA stream that does nothing before somebody waits for it."""

    def __init__(self, device=None):
        self.work = []
        self.lock = threading.Lock()

    def wait_stream(self, other):
        pass

    def record_event(self):
        return SimpleNamespace(synchronize=self.synchronize)

    def synchronize(self):
        # threads begin on the first device, where an event of another one would make a context
        assert threading.current_thread().device == "here"
        self.run()

    def run(self):
        # waiting returns when all is done, whoever waits
        with self.lock:
            while self.work:
                self.work.pop(0)()


def test_weights_wait_for_a_copy_that_a_gpu_makes_late(make_config, pairs_jsonl, tmp_path, monkeypatch, request):
    """Nothing is copied before the next update, or the writer, waits for it; and nothing is copied twice."""
    train(config_of(make_config, {}, tmp_path / "waits", pairs_jsonl))
    request.getfixturevalue("beside")
    streams, waits = [], []

    def stager(device):
        found = plain(device)
        found._stream = LateStream()
        streams.append(found._stream)
        return found

    def late_copy(tensor, held):
        held = torch.empty_like(tensor) if held is None else held
        streams[-1].work.append(lambda: held.copy_(tensor))
        return held

    def wait_event(event):
        waits.append(len(streams[-1].work))
        streams[-1].run()

    @contextmanager
    def device(device):
        threading.current_thread().device = "here"
        yield
        del threading.current_thread().device

    plain = saver._Stager
    current = SimpleNamespace(wait_event=wait_event)
    monkeypatch.setattr(saver, "_Stager", stager)
    monkeypatch.setattr(saver, "to_host", late_copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", device)
    train(config_of(make_config, {}, tmp_path / "beside", pairs_jsonl))
    compare(leavings(tmp_path / "beside"), leavings(tmp_path / "waits"))
    assert len(waits) > 1


def test_the_copy_is_in_order_with_the_steps():
    """On streams that are in no order but where one waits: the copy reads what the steps before it wrote, the update
    after it waits, and what is nobody else's stays until it is read."""
    with pretended_cuda() as device:
        weight = torch.randn(64, 64).pin_memory().to(CUDA, non_blocking=True)
        stager = saver._Stager(CUDA)
        for step in range(2):
            weight += step
            content = checkpoint.Content({"model": {"w": weight}, "optimizer": {"twice": weight * 2}}, {}, "")
            copied, want = stager.copy(content), on_host(weight).clone()
            del content
            with pytest.raises(UnorderedError):
                weight.mul_(2)
            stager.wait()
            weight.mul_(2)
            found = copied().tensors
            assert torch.equal(found["model"]["w"], want)
            assert torch.equal(found["optimizer"]["twice"], 2 * want)
        stager.close()
        assert device.streams is not None


def test_large_page_locked_memory_takes_its_bytes_and_is_given_back(monkeypatch):
    """torch's own allocator would take the next power of two, and keep it."""
    locked, given_back = [], []
    calls = SimpleNamespace(
        pin_memory=lambda address, size: locked.append((address, size)), unpin_memory=given_back.append
    )
    monkeypatch.setitem(sys.modules, "torch.cuda._pin_memory_utils", calls)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    held = host_memory.empty_page_locked((3, 1 << 17), torch.float32)
    view = held[1:].detach()
    assert locked == [(held.data_ptr(), 3 * (1 << 19))]
    del held
    gc.collect()
    assert given_back == []
    del view
    gc.collect()
    assert given_back == [locked[0][0]]


def test_memory_that_cannot_be_locked_is_pageable(monkeypatch, caplog):
    def refuses(address, size):
        raise RuntimeError("Registering memory failed with cudaError: 801.")

    monkeypatch.setitem(sys.modules, "torch.cuda._pin_memory_utils", SimpleNamespace(pin_memory=refuses))
    held = host_memory.empty_page_locked((1 << 18,), torch.float32)
    assert held.shape == (1 << 18,)
    assert "stay pageable" in caplog.text


def test_tied_weights_and_places_in_host_memory_are_kept():
    """One copy of what is one tensor, in the memory that the copy before had."""
    weight, moment = torch.arange(6.0).view(2, 3), torch.ones(3)
    content = checkpoint.Content({"model": {"a": weight, "b": weight}, "optimizer": {"m/a": moment}}, {}, "")
    stager = saver._Stager(torch.device("cpu"))
    first = stager.copy(content)().tensors
    assert first["model"]["a"] is first["model"]["b"]
    weight += 1
    assert torch.equal(first["model"]["a"], weight - 1)
    second = stager.copy(content)().tensors
    assert second["model"]["a"] is first["model"]["a"]
    assert torch.equal(second["model"]["a"], weight)
    assert second["optimizer"]["m/a"] is first["optimizer"]["m/a"] is not moment


@pytest.mark.usefixtures("beside")
def test_a_write_that_fails_ends_the_run_at_the_next_step(make_config, tmp_path, monkeypatch):
    config = make_config(train={"save_steps": 1, "num_train_epochs": 2})
    save, step, calls, failed = checkpoint.save_file, GuardedUpdate.step, [], threading.Event()

    def full(tensors, path):
        calls.append(path)
        if "checkpoint-2" in str(path):
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path)

    def after_failure(update, loss):
        if failed.is_set():
            [thread.join() for thread in threading.enumerate() if thread.name == "checkpoint"]
        return step(update, loss)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(GuardedUpdate, "step", after_failure)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint-2: no space left on the disk; free space"):
        train(config)
    run = tmp_path / "run"
    assert [step for step, _ in complete_checkpoints(run)] == [1]
    assert not list(run.glob(".*incomplete"))
    assert read_rows(run)[-1]["step"] <= 3
    monkeypatch.undo()
    monkeypatch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
    assert train(config, resume=True).resumed_from == 1


@pytest.mark.usefixtures("beside", "late", "ctrl_c_is_heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_request_to_end_waits_for_the_write(number, code, make_config, tmp_path, monkeypatch):
    config = make_config(train={"save_steps": 2})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    save = Saver.save

    def asked(*arguments, **options):
        save(*arguments, **options)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Saver, "save", asked)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == code
    ((step, path),) = complete_checkpoints(tmp_path / "run")
    assert (step, path.name) == (2, "checkpoint-2")
    check_content(path, remedy="")


@pytest.mark.usefixtures("beside", "late")
def test_an_error_of_a_step_waits_for_the_write(make_config, tmp_path):
    def stop(step, row):
        if step == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(make_config(train={"save_steps": 1}), callbacks=[stop])
    assert [step for step, _ in complete_checkpoints(tmp_path / "run")] == [1]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.mark.parametrize(
    ("wanted", "device", "fits", "found"),
    [
        (None, "cpu", True, False),
        (None, "cuda", True, True),
        (None, "cuda", False, False),
        (True, "cpu", True, True),
        (False, "cuda", True, False),
    ],
)
def test_where_checkpoints_are_written_beside_the_steps(wanted, device, fits, found, monkeypatch):
    policy = SimpleNamespace(device=torch.device(device))
    config = build_config(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "train": {"async_save": wanted},
        },
        "test",
    )
    need = storage.DiskNeed(model=1, checkpoint=1000, due=1, kept=1)
    monkeypatch.setattr(storage, "disk_need", lambda *arguments, **options: need)
    monkeypatch.setattr(storage, "free_memory", lambda: 1000 if fits else 999)
    assert storage.saves_beside(policy, config, total=8) is found
    if wanted:
        monkeypatch.setattr(storage, "free_memory", lambda: 999)
        with pytest.raises(UserError, match=r"train\.async_save: a copy .*: free memory, or set .* to false"):
            storage.saves_beside(policy, config, total=8)


@pytest.mark.parametrize(
    ("shards", "offload", "needed"),
    [(None, False, 12), (1, False, 96), (4, False, 24), (None, True, 20), (1, True, 160)],
)
def test_host_memory_is_that_of_what_each_process_holds(shards, offload, needed, monkeypatch):
    """Copies of 8 processes on a machine, and moments that are to wait there."""
    values = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}, "optim": {"offload": offload}}
    model = torch.nn.Linear(1, 8 * 1024, bias=False)
    policy = SimpleNamespace(device=torch.device("cuda"), model=model, has_adapter=False)
    monkeypatch.setattr(distributed, "size", lambda: 8)
    monkeypatch.setattr(distributed, "gather", lambda value: [value] * 8)
    monkeypatch.setattr(mesh, "shards", lambda: shards or 8)
    for free, found in ((needed * 8 * 1024, True), (needed * 8 * 1024 - 1, False)):
        monkeypatch.setattr(storage, "free_memory", lambda free=free: free)
        assert storage.saves_beside(policy, build_config(values, "test"), total=8) is found


@pytest.mark.usefixtures("beside")
def test_no_other_thread_uses_the_tokenizer(make_config, tmp_path, monkeypatch, tiny_tokenizer):
    """Rows may be tokenised while a checkpoint is written, and a tokenizer that two threads use raises."""
    main, save = threading.current_thread(), type(tiny_tokenizer).save_pretrained

    def by_main(*arguments, **options):
        assert threading.current_thread() is main
        return save(*arguments, **options)

    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", by_main)
    train(make_config(train={"save_steps": 1, "max_steps": 2}))
    assert [step for step, _ in complete_checkpoints(tmp_path / "run")] == [1, 2]
