"""Where benchmark results go: one JSON and one Markdown table each, in ``benchmarks/results/<device>/``, or below the
folder that ``DPO_BENCH_RESULTS`` names."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_journal import plain

RESULTS = Path(os.environ.get("DPO_BENCH_RESULTS") or Path(__file__).parent / "results")


def device_name() -> str:
    """``cpu``, or the name of the CUDA device in lower case with dashes."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return dashed(torch.cuda.get_device_name())


def dashed(name: str) -> str:
    """The name of a device as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def markdown_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of some columns; floats with four digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_result(name: str, result: dict[str, Any], *, columns: Sequence[str], folder: Path | None = None) -> Path:
    """Write ``<name>.json`` and ``<name>.md``, print the table, and return the JSON's path.

    Args:
        result: what was measured; ``rows`` become the table, other entries its header.
        columns: entries of a row that the table shows.
        folder: where to write; the device's folder by default.
    """
    folder = folder or RESULTS / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    result = {"date": datetime.date.today().isoformat(), **result}
    table = markdown_table(result["rows"], columns)
    header = "".join(f"- {key}: {value}\n" for key, value in result.items() if isinstance(value, str))
    (folder / f"{name}.md").write_text(f"# {name}\n\n{header}\n{table}")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    print(f"\n{table}")
    return path
