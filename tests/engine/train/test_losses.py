"""Whole runs with every loss: each learns, whatever the packs are."""

from __future__ import annotations

import math

import pytest

from dpo_kernels.losses import LOSS_TYPES
from engine.config.losses import REFERENCE_FREE_LOSSES
from engine.train.loop import train
from tests.engine.train.conftest import assert_same_trajectory


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_loss_trains(name, make_config, rows_of, tmp_path):
    settings = {"loss_type": name, "label_smoothing": 0.1 if name in ("robust", "exo_pair") else 0.0}
    config = make_config(loss=settings, optim={"learning_rate": 1e-3}, train={"num_train_epochs": 2})
    train(config)
    rows = rows_of(config)
    first, last = ([r["loss"] for r in rows[part]] for part in (slice(0, 4), slice(4, 8)))
    # discopop has its minimum below a margin of 0, so its loss may rise as the margin does.
    assert sum(last) < sum(first) or name == "discopop"
    assert all(math.isfinite(v) for r in rows for v in r.values())
    if name not in REFERENCE_FREE_LOSSES:
        assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft"])
def test_losses_of_a_whole_step_do_not_depend_on_packs(name, make_config, rows_of, tmp_path):
    runs = []
    for tokens_per_pack in (100_000, 220):
        config = make_config(
            loss={"loss_type": name},
            packing={"tokens_per_pack": tokens_per_pack},
            train={"output_dir": str(tmp_path / str(tokens_per_pack))},
        )
        train(config)
        runs.append(rows_of(config))
    assert_same_trajectory(*runs)


def test_losses_add(make_config, rows_of):
    config = make_config(loss={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]})
    train(config)
    assert rows_of(config)[0]["loss"] == pytest.approx(math.log(2) + 0.5 * 6.0, abs=0.5)
