"""One of several processes: runs jobs from a file, all in one process group, since starting processes takes longest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import distributed, endings
from engine.config import build_config
from engine.evaluate import evaluate
from engine.model import Policy, load_policy, shard_policy
from engine.reference import weights_digest
from engine.reference.keys import model_digest
from engine.train import checkpoint, loop, setup, sharded
from engine.train.checkpoint import complete_checkpoints
from engine.train.setup import prepare
from engine.train.throughput import peak_memory_gib
from tests.engine.distributed.updates import save_updates


def gradients(config, output: str) -> None:
    """Save the gradients of the first step, gathered, as this rank sees them."""
    run = prepare(config)
    run.policy.train()
    step = next(iter(run.feed.steps(0)))
    run.objective.backward(run.policy, step)
    grads = {n: distributed.full_tensor(p.grad) for n, p in run.policy.model.named_parameters() if p.grad is not None}
    torch.save(grads, f"{output}.{distributed.rank()}")


class Traffic(TorchDispatchMode):
    """Counts the bytes of what is gathered and of what is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        whole = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1}.get(func._schema.name)
        if whole is not None:
            self.bytes += args[whole].numel() * args[whole].element_size()
        return func(*args, **(kwargs or {}))


def traffic(config, output: str) -> None:
    """Save the gradients of the first step and the bytes that went between the processes for them."""
    run = prepare(config)
    run.policy.train()
    step = next(iter(run.feed.steps(0)))
    with Traffic() as counted:
        run.objective.backward(run.policy, step)
    named = run.policy.model.named_parameters()
    found = {"grads": {n: distributed.full_tensor(p.grad) for n, p in named}, "bytes": counted.bytes}
    found |= {"calls": dict(counted.calls), "packs": len(step.packs)}
    torch.save(found | {"digest": model_digest(run.policy)}, f"{output}.{distributed.rank()}")


def spread(config, output: str) -> None:
    """Load a model and spread it; write what it is then, and by how much the peak of resident memory rose, in bytes.

    The digest covers parameters and those buffers that are stored with a model.
    """
    cpu = torch.device("cpu")
    before = peak_memory_gib(cpu)
    policy = shard_policy(load_policy(config.model, device=cpu), cpu)
    rise = (peak_memory_gib(cpu) - before) * 2**30
    found = {"rise": rise, "digest": weights_digest(policy), "buffers": buffer_values(policy)}
    Path(f"{output}.{distributed.rank()}").write_text(json.dumps(found))


def buffer_values(policy: Policy) -> dict[str, list]:
    return {name: buffer.tolist() for name, buffer in policy.model.named_buffers()}


def die_in_save(config) -> None:
    """Train until rank 1 is killed in the middle of its second checkpoint."""
    save, calls = sharded.save, []

    def killed(*arguments) -> None:
        calls.append(None)
        if len(calls) == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*arguments)

    sharded.save = killed
    loop.train(config)


def fill_disk_in_save(config) -> None:
    """Train until the disk of rank 0 is full when its checkpoint begins; rank 1 finds no folder, and fails earlier."""
    save_file, claim_failure = checkpoint.save_file, endings._claim_failure

    def full(tensors, path) -> None:
        if distributed.rank() == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        while path.parent.exists():
            time.sleep(0.01)
        save_file(tensors, path)

    def late(store, code) -> bool | None:
        time.sleep(1.0 if distributed.rank() == 0 else 0.0)
        return claim_failure(store, code)

    checkpoint.save_file, endings._claim_failure = full, late
    loop.train(config)


def interrupt(source: str, target: str) -> None:
    """Make ``target`` what the run ``source`` was when its first checkpoint was done."""
    if distributed.is_main():
        shutil.copytree(source, target)
        (Path(target) / "manifest.json").unlink()
        for _, path in complete_checkpoints(Path(target))[1:]:
            shutil.rmtree(path)
    distributed.barrier()


def run_job(job: dict) -> None:
    if job["kind"] == "updates":
        return save_updates(job["output"])
    config = build_config(job["config"], "test")
    if job["kind"] == "train":
        loop.train(config, resume=job["resume"])
    elif job["kind"] == "gradients":
        gradients(config, job["output"])
    elif job["kind"] == "traffic":
        traffic(config, job["output"])
    elif job["kind"] == "spread":
        spread(config, job["output"])
    elif job["kind"] == "interrupt":
        interrupt(job["source"], job["target"])
    elif job["kind"] == "evaluate":
        values = evaluate(config, job["model"])
        Path(f"{job['output']}.{distributed.rank()}").write_text(json.dumps(values))
    elif job["kind"] == "full disk":
        fill_disk_in_save(config)
    else:
        die_in_save(config)


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    setup.measure_matmul_rate = lambda device, dtype: 1e12
    with distributed.process_group():
        for job in json.loads(jobs.read_text()):
            run_job(job)


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        code = 1
    distributed.leave(code)
