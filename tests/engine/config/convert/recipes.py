"""Published recipes, their keys written anew: the file, and every key of the run configuration that it sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import diff_from_defaults, load_config
from engine.config.convert import convert_file
from engine.config.trl_conversion import Conversion
from engine.errors import UserError

TRL = "model_name_or_path: m\ndataset_name: d\n"
"""The least that a file of TRL's has."""
FOLDER = Path(__file__).parent / "recipes"


def convert(path: Path, text: str, **kwargs: Any) -> Conversion:
    """Write ``text`` to ``path`` and convert that."""
    path.write_text(text)
    return convert_file(path, **kwargs)


def written(conversion: Conversion, folder: Path) -> dict[str, Any]:
    """What the converted file says, read back by the real schema: every key that is not at its default."""
    path = folder / "run.yaml"
    path.write_text(conversion.to_yaml())
    return {key: value for key, (value, _) in diff_from_defaults(load_config(path)).items()}


def notes(conversion: Conversion, *effects: str) -> dict[str, str]:
    """Texts by key."""
    return {note.key: note.text for note in conversion.notes if note.effect in effects}


def assert_stops(convert: Callable[[str], Any], text: str, *parts: str) -> None:
    """That a text is refused in words that hold all of ``parts``."""
    with pytest.raises(UserError) as caught:
        convert(text)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
