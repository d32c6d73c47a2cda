"""The learning-rate schedules of most runs: what share of ``optim.learning_rate`` a step has.

They are those of transformers, to the bit, under the same names. Others are taken from there (``optimizer.py``): with
them come the Trainer's parts and peft, whose import takes more than a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _warmed_up(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def constant(step: int, *, warmup: int, total: int) -> float:
    return 1.0


def constant_with_warmup(step: int, *, warmup: int, total: int) -> float:
    return _warmed_up(step, warmup) if step < warmup else 1.0


def linear(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return _warmed_up(step, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, *, warmup: int, total: int, num_cycles: float = 0.5) -> float:
    if step < warmup:
        return _warmed_up(step, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress)))


SHARES: dict[str, Callable[..., float]] = {
    share.__name__: share for share in (constant, constant_with_warmup, linear, cosine)
}
"""By ``optim.lr_scheduler_type``. Keywords beyond the numbers of steps are ``optim.lr_scheduler_kwargs``."""
