"""How long a run will take, from the operations that it needs and how fast they are done here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..model.load import DTYPES
from ..model.policy import Layout
from ..packing import PlanSummary, Step
from ..train.throughput import FlopModel, measure_matmul_rate
from .trial import Trial, try_out

EFFICIENCY = {"cpu": 0.5, "cuda": 0.4}
"""Share of the rate of large matrix products that a run is taken to reach, as ``perf/mfu`` counts it, where nothing
could be tried."""
RECOMPUTED = 4 / 3
"""Gradient checkpointing runs the forward pass a second time."""


@dataclass(frozen=True)
class Duration:
    """Seconds of training without start-up, checkpoints and evaluation."""

    seconds: float
    flop: float
    matmul_rate: float
    """FLOP per second of a large matrix product here."""
    trial: Trial | None
    """None: the efficiency was assumed."""
    untried: str = ""
    """Why."""

    @property
    def efficiency(self) -> float:
        """What the run reaches of ``matmul_rate``."""
        return self.flop / (self.seconds * self.matmul_rate)


def reason_of(error: Exception) -> str:
    """The first line of what it says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def forecast_duration(
    config: RunConfig,
    dataset: PreferenceDataset,
    steps: Sequence[Step],
    plan: PlanSummary,
    flops: FlopModel,
    *,
    trained_weights: int,
    device: torch.device,
    layout: Layout | None = None,
) -> Duration:
    """Forecast the training steps from a trial of some seconds, or from the rate of matrix products alone.

    Args:
        steps: the plan of an epoch.
        plan: the same in figures.
        layout: how packs are computed; on packs alone by default.
    """
    visible = int(dataset.lengths.visible_pairs(share_prompts=config.packing.share_prompts).sum())
    epochs = plan.total_steps / plan.steps_per_epoch
    flop = epochs * flops.step(plan.computed_tokens, plan.completion_tokens, visible)
    rate = measure_matmul_rate(device, DTYPES[config.model.dtype])
    try:
        trial = try_out(config, dataset, steps, flops, device=device, matmul_rate=rate, layout=layout or Layout())
    except Exception as error:
        # Models with code of their own may not take fewer layers; the forecast then says what it assumes.
        again = flops.mixers(plan.mixer_cells - plan.packed_tokens) if plan.mixer_cells else 0.0
        work = (flop + epochs * again) * (RECOMPUTED if config.train.gradient_checkpointing is True else 1.0)
        return Duration(work / (rate * EFFICIENCY[device.type]), flop, rate, None, reason_of(error))
    updates = plan.total_steps * trained_weights * trial.update_seconds_per_weight
    return Duration(flop / trial.pack_flop_per_second + updates, flop, rate, trial)
