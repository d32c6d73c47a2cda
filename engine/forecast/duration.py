"""How long a run will take, from the operations that it needs and the rate of matrix products here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config.schema import RunConfig
from engine.data.groups import PreferenceDataset
from engine.packing import PlanSummary
from engine.train.throughput import FlopModel, measure_matmul_rate

EFFICIENCY = {"cpu": 0.5, "cuda": 0.4}
"""Share of the rate of large matrix products that a run is taken to reach, as ``perf/mfu`` counts it. An
assumption: on the CPU a few rough runs reached 0.35 to 0.65, on CUDA devices none was made."""
RECOMPUTED = 4 / 3
"""Gradient checkpointing runs the forward pass a second time."""


@dataclass(frozen=True)
class Duration:
    """Seconds of training without start-up, checkpoints and evaluation."""

    seconds: float
    flop: float
    matmul_rate: float
    """FLOP per second of a large matrix product here."""
    efficiency: float


def forecast_duration(
    config: RunConfig,
    dataset: PreferenceDataset,
    plan: PlanSummary,
    flops: FlopModel,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Duration:
    """Forecast the training steps; measures the rate of matrix products for half a second."""
    visible = int(dataset.lengths.visible_pairs(share_prompts=config.packing.share_prompts).sum())
    epoch = flops.step(plan.packed_tokens, plan.completion_tokens, visible)
    flop = epoch * plan.total_steps / plan.steps_per_epoch
    rate, efficiency = measure_matmul_rate(device, dtype), EFFICIENCY[device.type]
    work = flop * (RECOMPUTED if config.train.gradient_checkpointing else 1.0)
    return Duration(work / (rate * efficiency), flop, rate, efficiency)
