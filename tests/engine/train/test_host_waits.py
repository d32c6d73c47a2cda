"""Between two logged steps the host reads nothing from the device.

The step runs on torch's ``meta`` device, whose tensors have shapes and no numbers: whatever would wait for a number on
a GPU (``item``, ``tolist``, ``bool``, ``nonzero``, a copy to the host) is an error there. What the loss ops do inside
is left out: they are only asked for shapes.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_kernels.losses import LOSS_TYPES
from engine.config.schema import LossConfig, ModelConfig, PackingConfig, TrainConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.model import Policy, load_policy
from engine.train.feed import TrainingFeed, TrainingStep
from engine.train.metrics import IntervalMeter
from engine.train.objective import Objective, Scored
from engine.train.optimizer import GuardedUpdate
from engine.train.references import ReferenceTable
from engine.train.throughput import FlopModel

META = torch.device("meta")


@pytest.fixture(scope="module")
def policy(tiny_model_dir) -> Policy:
    settings = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32")
    return load_policy(settings, device=torch.device("cpu")).to(META)


@pytest.fixture
def step(monkeypatch) -> TrainingStep:
    for op in ("linear_logps", "linear_dpo"):
        # The meta device has no autocast to ask for.
        monkeypatch.setattr(sys.modules[f"dpo_kernels.{op}.api"], "autocast_head", lambda *tensors: tensors)
    generator = np.random.default_rng(0)

    def ids() -> np.ndarray:
        return generator.integers(0, 300, 6, dtype=np.int32)

    dataset = PreferenceDataset([PreferenceGroup(i, ids(), (ids(), ids())) for i in range(4)])
    feed = TrainingFeed(
        dataset,
        PackingConfig(pairs_per_step=4, tokens_per_pack=36),
        TrainConfig(),
        lookup=ReferenceTable([(-30.0, -31.0)] * 4).lookup,
        flops=FlopModel(1.0, 1.0, 1, True, 1),
        device=META,
    )
    found = next(feed.steps(0))
    assert len(found.packs) == 2
    return found


@pytest.mark.parametrize("loss", [*LOSS_TYPES, "plackett_luce"])
def test_losses_and_gradients(loss, policy, step):
    objective = Objective(LossConfig(loss_type=loss))
    if not objective.needs_reference:
        step = replace(step, packs=tuple(replace(pack, ref_logps_S=None) for pack in step.packs))
    scored = objective.backward(policy, step)
    assert all(p.grad is not None and p.grad.is_meta for p in policy.parameters())
    policy.zero_grad()
    meter = IntervalMeter(META, peak_flops=1.0)
    meter.add(scored.means(), step.work)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        meter.row(step=1, epoch=1.0, grad_norm=torch.zeros(()), learning_rate=1.0)


class Fused(torch.optim.SGD):
    """Takes the verdict and the scale as torch's fused optimizers do."""

    def __init__(self, params):
        super().__init__(params, lr=1e-3)
        self.defaults["fused"] = True

    def step(self):
        assert self.found_inf.is_meta
        assert self.grad_scale.is_meta


def test_the_update(policy, step, monkeypatch):
    monkeypatch.setattr(GuardedUpdate, "deferred", True)
    total_norm = torch.nn.utils.get_total_norm
    # The meta device has no foreach kernels.
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads, foreach: total_norm(grads, foreach=False))
    optimizer = Fused(policy.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    update = GuardedUpdate(optimizer, schedule, max_grad_norm=1.0)
    scored: Scored = Objective(LossConfig()).backward(policy, step)
    assert update.step(scored.means()[0]).is_meta
    with pytest.raises(RuntimeError, match="meta"):
        update.ok()
