"""What a terminal shows while steps run: lines that fit it, and a bar below them."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from .. import distributed
from ..digits import shown_number


def terminal_width() -> int | None:
    """Columns of the terminal that lines go to; None where they go to a file or a pipe, which takes lines whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def log_line(row: Mapping[str, float], *, total_steps: int, seconds_left: float, width: int | None = None) -> str:
    """One readable line for a row of training metrics.

    Args:
        width: what does not fit into so many columns is left out, the least important first; None leaves out nothing.
    """
    left = int(seconds_left)
    parts = [
        # With its rank: the largest is left out first.
        (0, f"step {row['step']}/{total_steps}"),
        (6, f"epoch {row['epoch']:.2f}"),
        (0, f"loss {shown_number(row['loss'])}"),
        *([(3, f"aux {shown_number(row['aux_loss'])}")] if "aux_loss" in row else []),
        (1, f"accuracy {shown_number(row['rewards/accuracies'])}"),
        # A step of unpaired rows may have none of a label.
        *([(2, f"margin {shown_number(row['rewards/margins'])}")] if "rewards/margins" in row else []),
        *([(3, f"kl {shown_number(row['kl'])}")] if "kl" in row else []),
        (7, f"grad norm {shown_number(row['grad_norm'])}"),
        (8, f"lr {shown_number(row['learning_rate'])}"),
        (9, f"{row['perf/pairs_per_second']:.1f} {'rows' if 'count/chosen' in row else 'pairs'}/s"),
        (5, f"{row['perf/tokens_per_second']:,.0f} tokens/s"),
        (10, f"mfu {row['perf/mfu']:.1%}"),
        (11, f"{row['perf/peak_memory_gib']:.2f} GiB"),
        (4, f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"),
    ]
    while width is not None and len(_joined(parts)) > width and (largest := max(rank for rank, _ in parts)) > 0:
        parts = [(rank, text) for rank, text in parts if rank != largest]
    return _joined(parts)


def _joined(parts: list[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)


@contextmanager
def step_bar(done: int, total: int) -> Iterator[Callable[[], object]]:
    """A bar of steps below the lines that are logged, in a terminal; elsewhere, and on other ranks, nothing.

    Yields:
        What is called after each step.
    """
    if not (distributed.is_main() and sys.stdout.isatty() and sys.stderr.isatty()):
        yield lambda: None
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        logging_redirect_tqdm([logging.getLogger()]),
        tqdm(total=total, initial=done, unit="step", desc="training", leave=False, dynamic_ncols=True) as bar,
    ):
        yield bar.update
