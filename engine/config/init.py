"""``dpo init``: a commented configuration file, new or converted."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from ..errors import UserError, write_fault
from .convert import convert_file
from .trl_conversion import Conversion


def template_text() -> str:
    """The commented template: every key at its default, but for the model and the data."""
    return resources.files(__package__).joinpath("template.yaml").read_text(encoding="utf-8")


def write_template(path: Path) -> None:
    """Write the template to ``path``.

    Raises:
        UserError: the file exists or cannot be written.
    """
    _write_new(path, template_text())


def write_converted(source: Path, path: Path, *, num_processes: int | None = None) -> Conversion:
    """Convert ``source``, a file of another trainer, and write the result to ``path``.

    Raises:
        UserError: the source cannot be converted, or ``path`` exists or cannot be written.
    """
    conversion = convert_file(source, num_processes=num_processes)
    _write_new(path, conversion.to_yaml())
    return conversion


def _write_new(path: Path, text: str) -> None:
    try:
        # exclusive creation, so that a file that appears meanwhile is not overwritten either
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists already; remove it or choose another name with --output") from None
    except FileNotFoundError:
        raise UserError(f"{path}: the folder {path.parent} does not exist; create it first") from None
    except OSError as error:
        if path.is_file() and path.stat().st_size < len(text):
            os.unlink(path)
        found = write_fault(error)
        advice = found.remedy("choose another place with --output")
        raise UserError(f"{path}: cannot be written: {found.what}; {advice}") from None
