"""Blocks that are compiled or Liger's, in shards of two processes: the gradients of plain blocks, on each of them."""

from __future__ import annotations

import pytest

from tests.engine.distributed.launch import launch

CODE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import pytest, torch
from engine import distributed
from engine.config.schema import ModelConfig
from engine.model import load_policy, shard_policy
from engine.model.kernels import compiled
from engine.model.kernels.choice import fuse_blocks
from tests.engine.model.kernels.policies import assert_close, packs

kernels, how, compiled.BACKEND = {kernels!r}, {how!r}, {backend!r}
cpu = torch.device("cpu")
with distributed.process_group():
    if kernels == "liger":
        from tests.engine.model.kernels.liger_interpreted import liger_on_the_cpu
        liger_on_the_cpu(pytest.MonkeyPatch())
    model = ModelConfig(model_name_or_path={folder!r}, dtype="float32")
    policy = shard_policy(load_policy(model, device=cpu, gradient_checkpointing=how), cpu).train()
    batches = packs(*((1,) if kernels == "liger" else (3, 1)))

    def gradients(batch):
        policy.zero_grad()
        logps = policy.logps(batch)
        logps.sum().backward()
        return [logps.detach(), *(distributed.full_tensor(p.grad) for p in policy.parameters())]

    plain = [gradients(batch) for batch in batches]
    fuse_blocks(policy, kernels)
    assert policy.kernels.name == kernels
    assert policy.exchange.changes
    for batch, want in zip(batches, plain):
        assert_close(gradients(batch), want)
    policy.exchange.off()
    assert_close(gradients(batches[0]), plain[0], 0.0)
"""


@pytest.mark.parametrize(
    ("kernels", "how", "backend"),
    [
        ("compile", False, "eager"),
        pytest.param("compile", "selective", "aot_eager", marks=pytest.mark.slow),
        pytest.param("compile", True, "inductor", marks=pytest.mark.slow),
        ("liger", "selective", ""),
    ],
)
def test_gradients_are_those_of_plain_blocks(kernels, how, backend, tiny_model_dir):
    if kernels == "liger":
        pytest.importorskip("triton")
        pytest.importorskip("liger_kernel")
    code = CODE.format(kernels=kernels, how=how, backend=backend, folder=str(tiny_model_dir))
    ended = launch([["-c", code]] * 2)
    assert [process.code for process in ended] == [0, 0], ended[0].err[-3000:] + ended[1].err[-3000:]
