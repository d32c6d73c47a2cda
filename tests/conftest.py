"""Fixtures that every test shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Small tensors on several threads mostly wait for each other, above all when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What was tuned on this machine is not what is tested.
os.environ.setdefault("DPO_TILE_CONFIGS", "shipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import settings

    if hasattr(config, "workerinput"):
        # Ctrl-C is for the process that started the workers, which ends them.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    # Every run draws the same examples, so that a change is to blame for a failure; the long form looks for new ones.
    settings.register_profile("fast", derandomize=True, deadline=None, max_examples=100)
    settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)
    settings.load_profile("long" if config.getoption("--slow") else "fast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        # Markers alone: keywords also hold what a test is parametrised with.
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Golden values, data and a small model that lie beside a development checkout; absent for users."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the development data folder is not beside this checkout")
    return path
