"""The commands that are killed: small data, tiny random models, and configurations that take about a second."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.engine.conftest import CHAT_TEMPLATE, build_tokenizer, preference_rows, save_tiny_model
from tests.engine.train.conftest import save_family

MODEL, PAIRS, EVAL = "model", "pairs.jsonl", "eval.jsonl"
HYBRID, IN_ROWS = "lfm2", "bloom"
"""Families of the models whose mixers get rows, and that run in rows; their folders are named after them."""


@dataclass(frozen=True)
class Case:
    """A command and its configuration."""

    command: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranks: int = 1
    """Processes."""
    own_store: bool = False
    """Whether every run starts with an empty reference store."""
    evaluates: bool = False
    model: str = MODEL
    slow_seconds: float = 0.0
    """How long a change of the file system takes that is made beside the steps."""


CASES = {
    "full": Case("train", {"train": {"save_steps": 2, "save_total_limit": 1}}),
    "lora": Case(
        "train",
        {
            "model": {"lora": {"r": 4, "dropout": 0.3}},
            "optim": {"optimizer": "rmsprop", "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 2},
            "train": {"save_steps": 3, "save_total_limit": 2},
        },
    ),
    # The last evaluation comes after the last checkpoint, and rows are means over steps on both sides of a checkpoint.
    "evaluated": Case(
        "train",
        {"train": {"save_steps": 2, "eval_steps": 3, "logging_steps": 3, "report_to": ["tensorboard"]}},
        evaluates=True,
    ),
    "accumulated": Case(
        "train",
        {
            "packing": {"tokens_per_pack": 220},
            "model": {"dtype": "bfloat16"},
            "train": {"save_steps": 1, "save_total_limit": 1},
        },
        own_store=True,
    ),
    "stochastic": Case(
        "train",
        {
            "packing": {"tokens_per_pack": 220},
            "model": {"dtype": "bfloat16"},
            "optim": {"master_weights": "stochastic"},
            "train": {"save_steps": 2, "save_total_limit": 1},
        },
        own_store=True,
    ),
    # A checkpoint takes several steps; the next one waits for it.
    "beside": Case(
        "train",
        {"train": {"save_steps": 2, "save_total_limit": 1, "eval_steps": 3, "async_save": True}},
        evaluates=True,
        slow_seconds=0.01,
    ),
    "beside lora": Case(
        "train",
        {
            "model": {"lora": {"r": 4, "dropout": 0.3}},
            "train": {"save_steps": 1, "save_total_limit": 2, "async_save": True},
        },
        slow_seconds=0.01,
    ),
    "sharded kahan": Case(
        "train",
        {
            "model": {"dtype": "bfloat16"},
            "optim": {"master_weights": "kahan"},
            "train": {"save_steps": 2, "save_total_limit": 1},
        },
        ranks=2,
        own_store=True,
    ),
    "sharded 8 bits": Case(
        "train",
        {"optim": {"optimizer": "paged_adamw_8bit"}, "train": {"save_steps": 2, "save_total_limit": 1}},
        ranks=2,
        own_store=True,
    ),
    "unpaired": Case(
        "train",
        {"loss": {"loss_type": "kto"}, "train": {"save_steps": 2, "eval_steps": 3, "logging_steps": 3}},
        own_store=True,
        evaluates=True,
    ),
    "references": Case("train", {"packing": {"tokens_per_pack": 220}, "train": {"save_steps": 4}}, own_store=True),
    "precompute": Case("precompute", {"packing": {"tokens_per_pack": 220}}, own_store=True),
    "sharded": Case(
        "train",
        {
            "packing": {"tokens_per_pack": 220},
            "model": {"dtype": "bfloat16"},
            "train": {"save_steps": 1, "save_total_limit": 1},
        },
        ranks=2,
        own_store=True,
    ),
    "sharded beside": Case(
        "train",
        {"packing": {"tokens_per_pack": 220}, "train": {"save_steps": 2, "save_total_limit": 1, "async_save": True}},
        ranks=2,
        own_store=True,
        slow_seconds=0.005,
    ),
    "sharded lora": Case(
        "train",
        {
            "model": {"lora": {"r": 4, "dropout": 0.3}},
            "train": {"save_steps": 2, "save_total_limit": 2, "eval_steps": 3, "report_to": ["tensorboard"]},
        },
        ranks=2,
        evaluates=True,
    ),
    "divided": Case("precompute", {"packing": {"tokens_per_pack": 220}}, ranks=2, own_store=True),
    "mixers in rows": Case(
        "train",
        {
            "model": {"lora": {"r": 4, "dropout": 0.3}},
            "train": {"save_steps": 2, "save_total_limit": 2, "gradient_checkpointing": True},
        },
        own_store=True,
        model=HYBRID,
    ),
    "rows": Case(
        "train",
        {"packing": {"tokens_per_pack": 600}, "train": {"save_steps": 2, "save_total_limit": 1, "eval_steps": 3}},
        own_store=True,
        evaluates=True,
        model=IN_ROWS,
    ),
    "sharded mixers in rows": Case(
        "train",
        {"packing": {"tokens_per_pack": 220}, "train": {"save_steps": 1, "save_total_limit": 1}},
        ranks=2,
        own_store=True,
        model=HYBRID,
    ),
}

if importlib.util.find_spec("bitsandbytes") is None:
    del CASES["sharded 8 bits"]


def write_inputs(folder: Path) -> None:
    """The models and the data of all cases."""
    tokenizer = build_tokenizer(chat_template=CHAT_TEMPLATE)
    save_tiny_model(folder / MODEL, tokenizer)
    for family in (HYBRID, IN_ROWS):
        save_family(family, folder / family, tokenizer)
    for name, count, seed in ((PAIRS, 24, 0), (EVAL, 8, 1)):
        rows = preference_rows(count, seed=seed)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(case: Case, inputs: Path, place: Path, **sections: dict[str, Any]) -> None:
    """``place/run.yaml``: a run into ``place/run``, with ``place/store`` when the case has a store of its own."""
    values: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": str(inputs / case.model), "dtype": "float32"},
        "data": {"dataset_name": str(inputs / PAIRS), "max_length": 160},
        "packing": {"pairs_per_step": 6, "tokens_per_pack": 400},
        "optim": {"learning_rate": 2e-3},
        "reference": {"store": str((place if case.own_store else inputs) / "store")},
        "train": {"output_dir": str(place / "run"), "num_train_epochs": 2, "logging_steps": 1, "report_to": []},
    }
    if case.evaluates:
        values["data"]["eval_dataset_name"] = str(inputs / EVAL)
    for changes in (case.sections, sections):
        for section, entries in changes.items():
            values.setdefault(section, {}).update(entries)
    place.mkdir(parents=True, exist_ok=True)
    (place / "run.yaml").write_text(yaml.safe_dump(values))
