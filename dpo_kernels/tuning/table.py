"""Writing the user's table: an entry at a time, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kernels.kernels.tile_config import TABLE_FORMAT, dtype_name, read_table
from dpo_kernels.tuning.errors import TuningError

if TYPE_CHECKING:
    from dpo_kernels.tuning.search import Result


def check_writable(path: Path) -> None:
    """Raise TuningError before any work when `path` cannot be written, TileTableError when it holds something else."""
    if path.is_file():
        read_table(path)
    elif path.exists():
        raise TuningError(f"{path}: is not a file; name one with --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise TuningError(f"{path}: cannot be written: {error.strerror}; name another file with --output") from error


def write_entry(path: Path, arch: str, result: Result) -> None:
    """Put the configuration that was found before the others of its kind; the shipped one needs no entry."""
    content: dict[str, Any] = {"format": TABLE_FORMAT, "archs": {}}
    if path.is_file():
        read_table(path)
        content = json.loads(path.read_text())
    problem = result.group[0]
    bounds = dict(problem.bounds())
    bounds |= {name: bool(bounds[name]) for name in ("heavy", "aligned")}
    by_dtype = content["archs"].setdefault(arch, {}).setdefault(problem.kernel, {})
    rows = [row for row in by_dtype.get(dtype_name(problem.dtype), []) if row["bounds"] != bounds]
    if result.tuned:
        rows.insert(0, {"bounds": bounds, "config": asdict(result.best), "measured": result.measured()})
    by_dtype[dtype_name(problem.dtype)] = rows
    try:
        _replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise TuningError(f"{path}: cannot be written: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    """A reader, or whoever comes after a crash, sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
