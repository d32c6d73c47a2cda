"""Configurations of runs that take a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import build_config
from engine.config.schema import RunConfig
from tests.conformance.families import tiny_config, tiny_model

MakeConfig = Callable[..., RunConfig]

TRAJECTORY = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "learning_rate", "num_tokens")


@pytest.fixture(autouse=True)
def _one_thread():
    # Models this small gain nothing from threads, and on a busy machine threads that wait for each other lose much.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _assumed_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def default_config(folder: Path, model: Path, pairs: Path, store: Path, /, **sections: dict) -> RunConfig:
    """Four steps of six pairs, in several packs each, into ``folder/run``, unless changed."""
    defaults = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "data": {"dataset_name": str(pairs), "max_length": 160},
        "packing": {"pairs_per_step": 6, "tokens_per_pack": 400},
        "loss": {},
        "optim": {"learning_rate": 2e-3},
        "reference": {"store": str(store)},
        "train": {"output_dir": str(folder / "run"), "logging_steps": 1, "report_to": []},
    }
    return build_config({name: {**values, **sections.get(name, {})} for name, values in defaults.items()}, "test")


@pytest.fixture
def make_config(tmp_path: Path, tiny_model_dir: Path, pairs_jsonl: Path, store_dir: Path) -> MakeConfig:
    """``make_config(section={...}, ...)``: ``default_config`` with these sections, into ``tmp_path/run``."""
    return partial(default_config, tmp_path, tiny_model_dir, pairs_jsonl, store_dir)


def save_family(family: str, folder: Path, tokenizer: Any) -> Path:
    """Write a tiny model of a family, and the tokenizer, into a folder."""
    config = tiny_config(family)
    config.vocab_size = len(tokenizer)
    config.initializer_range = 0.02
    tiny_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_rows(run_dir: Path | str) -> list[dict]:
    """The rows of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def rows_of() -> Callable[[RunConfig], list[dict]]:
    """Training rows of a finished run, without those of evaluations."""
    return lambda config: [r for r in read_rows(config.train.output_dir) if "loss" in r]


def assert_same_trajectory(
    ours: list[dict], theirs: list[dict], tolerance: float = 1e-5, names: tuple[str, ...] = TRAJECTORY
) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)
