"""The lines that ``dpo plan`` adds for memory and time."""

from __future__ import annotations

import pytest

from engine.config.schema import DataConfig, ModelConfig, PackingConfig, RunConfig, TrainConfig
from engine.data import load_dataset_groups
from engine.forecast import describe_forecast, text


@pytest.fixture
def config(tiny_model_dir, pairs_jsonl):
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"),
        data=DataConfig(dataset_name=str(pairs_jsonl)),
        packing=PackingConfig(pairs_per_step=8, tokens_per_pack=512),
        train=TrainConfig(max_steps=6),
    )


@pytest.fixture
def dataset(config, tiny_tokenizer):
    return load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]


def test_memory_by_part_and_time(config, dataset, monkeypatch):
    monkeypatch.setattr("engine.forecast.duration.measure_matmul_rate", lambda device, dtype: 1e9)
    lines = describe_forecast(dataset, config).splitlines()
    names = [line[:24].strip() for line in lines[-8:]]
    assert names == [
        "peak memory",
        "weights",
        "gradients",
        "optimizer state",
        "activations",
        "inside the head",
        "process",
        "time",
    ]
    assert "at 50% of the 1e+09 FLOP/s" in lines[-1]
    assert lines[0].startswith("preference groups")


def test_a_model_that_does_not_run_without_data_leaves_the_rest(config, dataset, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("it looks at values\nsecond line")

    monkeypatch.setattr(text, "forecast_memory", fail)
    last = describe_forecast(dataset, config).splitlines()[-1]
    assert last.split(maxsplit=4)[:4] == ["memory", "and", "time", "unknown"]
    assert last.endswith("the model does not run on shapes alone: it looks at values")
