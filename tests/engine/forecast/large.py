"""Configs of models that nobody downloads, and packs for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig
from engine.config.training import TrainConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def save_config(folder: Path, *, model_type: str = "llama", **values: Any) -> Path:
    """A folder with a config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": model_type, "max_position_embeddings": 131072, "tie_word_embeddings": False, **values}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_config(folder: Path, *, train: dict | None = None, optim: dict | None = None, **model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(folder), **model),
        data=DataConfig(dataset_name="none"),
        train=TrainConfig(**(train or {})),
        optim=OptimConfig(**(optim or {})),
    )


def groups(tokens: int, prompt: int = 512, response: int = 256) -> list[PreferenceGroup]:
    """Pairs of one size that fill a pack."""
    ids = [np.arange(n, dtype=np.int32) for n in (prompt, response)]
    size = prompt + 2 * response
    return [PreferenceGroup(i, ids[0], (ids[1], ids[1])) for i in range(tokens // size)]


def pairs(count: int, **sizes: int) -> PreferenceDataset:
    return PreferenceDataset(groups(count * (sizes.get("prompt", 512) + 2 * sizes.get("response", 256)), **sizes))
