"""TRL's files, converted."""

from __future__ import annotations

import pytest

from engine.config import load_config
from engine.config.trl_conversion import Conversion

from .convert.recipes import convert as convert_text


@pytest.fixture
def convert(tmp_path):
    def run(text: str, **kwargs) -> Conversion:
        return convert_text(tmp_path / "trl.yaml", text, **kwargs)

    return run


@pytest.fixture
def load(tmp_path, convert):
    """The run configuration that a converted file means, read back from disk."""

    def run(text: str, **kwargs):
        path = tmp_path / "run.yaml"
        path.write_text(convert(text, **kwargs).to_yaml())
        return load_config(path)

    return run
