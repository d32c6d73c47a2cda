"""Run folders with made-up metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.plain_json import to_json


def metric_rows(steps: int, *, every: int = 1, eval_every: int | None = None) -> list[dict[str, Any]]:
    """Rows as the training loop logs them, along a plausible course of training."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        done = step / steps
        margin = 1.6 * (1 - math.exp(-3 * done)) + rng.normal(0, 0.12)
        rows.append(
            {
                "step": step,
                "epoch": done,
                "loss": math.log1p(math.exp(-margin)),
                "grad_norm": 2.5 * math.exp(-2 * done) + abs(rng.normal(0, 0.3)),
                "learning_rate": 1e-6 * (1 - done),
                "rewards/chosen": 0.3 * margin,
                "rewards/rejected": -0.7 * margin,
                "rewards/accuracies": min(1.0, 0.5 + 0.4 * done + rng.normal(0, 0.05)),
                "rewards/margins": margin,
                "logps/chosen": -190 + 10 * done + rng.normal(0, 6),
                "logps/rejected": -210 - 40 * done + rng.normal(0, 6),
                "num_tokens": 21_000 * step,
                "perf/tokens_per_second": 8_400 + rng.normal(0, 300),
                "perf/pairs_per_second": 21 + rng.normal(0, 1),
                "perf/padding_fraction": 0.0,
                "perf/shared_fraction": 0.41 + rng.normal(0, 0.01),
                "perf/peak_memory_gib": 2.25,
            }
        )
        if eval_every and step % eval_every == 0:
            names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
            names += ("logps/chosen", "logps/rejected")
            rows.append({"step": step, "epoch": done} | {f"eval_{name}": rows[-1][name] * 0.96 for name in names})
    return rows


@pytest.fixture
def check_words() -> Callable[[Any], None]:
    """Asserts that headings, labels and legends lie inside their picture."""

    def check(figure: Any) -> None:
        figure.canvas.draw()
        words, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(words.x0, words.y0) >= 0
        assert words.x1 <= width
        assert words.y1 <= height

    return check


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder as a run does; every piece but the metrics can be left out."""

    def write(
        rows: list[dict[str, Any]],
        *,
        config: str = "",
        data: Any = None,
        evaluation: Any = None,
        details: Any = None,
        name: str = "run",
    ) -> Path:
        run = tmp_path / name
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))
        if config:
            (run / "config.yaml").write_text(config)
        for name, content in (
            ("data.json", data),
            ("evaluation.json", evaluation),
            ("evaluation_details.json", details),
        ):
            if content is not None:
                (run / name).write_text(to_json(content))
        return run

    return write


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    return metric_rows
