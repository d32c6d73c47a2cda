"""Races of the head on the CPU, and what is written of them: JSON, a Markdown table, a bar chart."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Contender, versions
from benchmarks.figures import draw_table
from benchmarks.inputs import make_inputs, softmax_shape
from benchmarks.measure import Race
from benchmarks.results import RESULTS, device_name, write_result
from benchmarks.shapes import CPU_BENCHMARK, HeadShape
from benchmarks.tasks import COLUMNS, LEGEND

THREADS = 2
RESPONSE_LENGTH = 128


Row = dict[str, Any]


def race_on(kind: str, entrants: Mapping[str, Sequence[Contender]], shape: HeadShape | None = None) -> Race:
    """A warmed-up race, by default at the CPU's shape, float32 and two threads."""
    torch.set_num_threads(THREADS)
    race = Race(make_inputs(kind, shape or CPU_BENCHMARK, length=RESPONSE_LENGTH), entrants)
    race.warm_up()
    return race


def write_race(
    name: str,
    title: str,
    races: Mapping[str, Race],
    *,
    targets: Callable[[Sequence[Row]], dict[str, str]] | None = None,
    folder: Path | None = None,
) -> Row:
    """Write the results of races by kind of input, and the chart of the first; returns what the JSON holds.

    ``targets`` says, from the rows of the first kind, what was to be reached and what was.
    """
    folder = folder or RESULTS / device_name()
    rows = [{"inputs": kind, **row} for kind, race in races.items() for row in race.rows()]
    first = next(iter(races))
    any_inputs = races[first].inputs
    dtype = str(any_inputs.hidden_ND.dtype).removeprefix("torch.")
    shape = any_inputs.shape
    settings = f"N={shape.T} D={shape.D} V={shape.V} {dtype}, {any_inputs.length} rows per response"
    charted = [row for row in rows if row["inputs"] == first]
    result = {
        "machine": machine(),
        "settings": settings,
        **{f"{kind} inputs": f"{race.inputs.source}; {softmax_shape(race.inputs)}" for kind, race in races.items()},
        "versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
        "legend": LEGEND,
        **(targets(charted) if targets else {}),
        "rows": rows,
    }
    write_result(name, result, columns=("inputs", *COLUMNS), folder=folder)
    draw_table(charted, folder / f"{name}.png", title=title, subtitle=f"{settings}; {first} hidden states; {machine()}")
    return result


def machine() -> str:
    """What the numbers were measured on, and how busy it was: a loaded machine's numbers are not worth keeping."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f}"
