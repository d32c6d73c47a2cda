"""The run that is forecast."""

from __future__ import annotations

import pytest

from engine.config.schema import DataConfig, ModelConfig, PackingConfig, RunConfig, TrainConfig


@pytest.fixture
def config(tiny_model_dir, pairs_jsonl):
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"),
        data=DataConfig(dataset_name=str(pairs_jsonl)),
        packing=PackingConfig(pairs_per_step=8, tokens_per_pack=512),
        train=TrainConfig(max_steps=6),
    )
