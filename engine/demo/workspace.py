"""The folder of a demo: made once, replaced by the next demo, and never anybody else's."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, write_fault

MARKER = ".dpo-demo"
_MARKER_TEXT = "Written by `dpo demo`, which replaces what it made here when it runs again.\n"


@dataclass(frozen=True)
class Workspace:
    """Where the parts of a demo lie."""

    folder: Path

    @property
    def starting_model(self) -> Path:
        return self.folder / "starting-model"

    @property
    def train_data(self) -> Path:
        return self.folder / "data" / "train.jsonl"

    @property
    def held_out_data(self) -> Path:
        return self.folder / "data" / "held-out.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def references(self) -> Path:
        return self.folder / "references"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def made_here(self) -> tuple[Path, ...]:
        """Everything that a demo writes; nothing else in the folder is ever removed."""
        return (self.starting_model, self.train_data.parent, self.config, self.references, self.run)


def prepare_workspace(folder: Path) -> Workspace:
    """Make ``folder``, or clear what an earlier demo left in it.

    Raises:
        UserError: the folder holds something and no demo made it, or it cannot be written.
    """
    workspace = Workspace(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder: choose another place with --output")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise UserError(
                f"{folder} holds files that `dpo demo` did not write: choose another folder with --output, or empty it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
        for path in workspace.made_here:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        workspace.train_data.parent.mkdir()
    except OSError as error:
        found = write_fault(error)
        advice = found.remedy("choose another place with --output")
        raise UserError(f"cannot write to {folder}: {found.what}; {advice}") from error
    return workspace
