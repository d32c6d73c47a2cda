"""Published recipes, their keys written anew: the file, and every key of the run configuration that it sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import diff_from_defaults, load_config
from engine.config.convert import convert_file
from engine.config.trl_conversion import Conversion

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


def notes(conversion: Conversion, effect: str) -> dict[str, str]:
    """Texts by key."""
    return {note.key: note.text for note in conversion.notes if note.effect == effect}
