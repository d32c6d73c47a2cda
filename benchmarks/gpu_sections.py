"""The sections of ``benchmarks.gpu``. A section's checks are made, and its modules imported, in its own process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from benchmarks.gpu_table import Check, Context, Section


def _from(place: str) -> Callable[[Context], Iterable[Check]]:
    """The function ``module:name``, imported when it is called."""
    module, name = place.split(":")
    return lambda context: getattr(importlib.import_module(f"benchmarks.{module}"), name)(context)


SECTIONS = {
    "environment": Section("The machine", _from("gpu_numbers:environment_checks"), 0, 75),
    "cuda": Section("What CUDA asks of the ops", _from("gpu_cuda:cuda_checks"), 1, 150, shards=2),
    "kernels": Section("Kernels and ops against float64", _from("gpu_checks:kernel_checks"), 1, 150, shards=4),
    "options": Section("Statistics, filter, main gradient", _from("gpu_options:option_checks"), 1, 150, shards=2),
    "attention": Section("Attention backends", _from("gpu_engine:attention_checks"), 1, 150),
    "steps": Section("Training steps", _from("gpu_engine:step_checks"), 1, 150),
    "limits": Section("Edges", _from("gpu_limits:limit_checks"), 1, 150),
    "sanitizer": Section("compute-sanitizer", _from("gpu_cuda:sanitizer_checks"), 1, 150, shards=3),
    "head": Section("The head, raced", _from("gpu_numbers:head_checks"), 2, 150),
    "training": Section("Training, measured", _from("gpu_training:training_checks"), 3, 160),
    "profile": Section("Where the head's time goes", _from("gpu_numbers:profile_checks"), 4, 25),
    "sizes": Section("Sizes past 2^31", _from("gpu_limits:size_checks"), 5, 35),
    "shapes": Section("The head at other shapes", _from("gpu_numbers:shape_checks"), 6, 40),
    "blocks": Section("Fused blocks and checkpointing, on and off", _from("gpu_blocks:block_checks"), 7, 160),
    "ways": Section("Memory and precision, on and off", _from("gpu_ways:way_checks"), 8, 160),
    "saves": Section("Checkpoints beside the steps, several devices", _from("gpu_ways:save_checks"), 9, 90),
    "flex": Section("FlexAttention beside flash kernels and scores in the open", _from("gpu_flex:flex_checks"), 10, 90),
}
"""In order of importance. All up to the head at other shapes fit one command on a lent machine; each of those behind
them wants a command of its own."""
