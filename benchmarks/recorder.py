"""What a section of ``benchmarks.gpu`` has found so far, kept in a file."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch


class SkippedError(Exception):
    """Why a section has nothing to do here."""


class Recorder:
    """``record[name] = value`` writes the file anew, so that a section that is stopped leaves what it had."""

    def __init__(self, path: Path, folder: Path, *, dry_run: bool):
        """``folder`` takes files that are results themselves."""
        self.path = path
        self.folder = folder
        self.dry_run = dry_run
        if not dry_run and not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device; --dry-run runs the same on the CPU")
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.float32 if dry_run else torch.bfloat16
        self._values: dict[str, Any] = {}

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._values, default=str))
        partial.replace(self.path)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
