"""Two processes against one: the head runs inside the model's forward, so gradients are averaged over ranks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.dpo_kernels.integrations.trl_setup import distributed_worker, score, sharding_case, train_one_step
from tests.engine.model.families import tiny_model
from tests.ranks import results_of_two

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    return results_of_two(distributed_worker, tmp_path_factory.mktemp("ranks"))


def test_ddp_step_is_that_of_one_process(ranks, tmp_path):
    logged, weights = train_one_step(tmp_path, per_device_train_batch_size=4)
    initial = tiny_model("llama")
    assert not torch.equal(weights["lm_head.weight"], initial.lm_head.weight)
    for rank in ranks:
        for name, want in weights.items():
            assert_close(rank["weights"][name], want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert logged["grad_norm"] > 0
    for name, want in logged.items():
        if name != "epoch":
            assert ranks[0]["logged"][name] == pytest.approx(want, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("shard_head", [False, True], ids=["head with the rest", "head sharded by itself"])
def test_fsdp_gradients_are_those_of_one_process(ranks, shard_head):
    model, ids = sharding_case()
    score(model, ids).backward()
    for rank in ranks:
        found = rank[f"fsdp_{shard_head}"]
        for name, parameter in model.named_parameters():
            assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
