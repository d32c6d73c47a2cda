"""What fuses a block, and what is computed again: each on and off, at the shapes of a model of 0.5B and of one of 8B.

The larger one has four of its layers: all of them, with the state of an optimizer, fit no single card.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_table import Check, Context
from benchmarks.gpu_training import measure_steps

SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "8B, 4 layers": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    f"{kernels}{words}": {"kernels": kernels, "checkpointing": checkpointing}
    for checkpointing, words in ((False, ""), ("selective", ", selective"), (True, ", checkpoints"))
    for kernels in ("none", "liger", "compile")
}
PEAKS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 products by the data sheets, in FLOP a second, by a part of the device's name."""


def block_checks(context: Context) -> Iterator[Check]:
    # a quick run tries each kind of kernels once
    for shape, layers in list(SHAPES.items())[: 1 if context.quick else None]:
        for name, options in list(WAYS.items())[: 3 if context.quick else None]:
            yield Check(f"{shape}: {name}", partial(measure, context, options, layers), seconds=60)


def measure(context: Context, options: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, shares of both peak rates, memory, and whether a step waits for the device."""
    found = measure_steps(context, options, layers)
    name = "" if context.dry_run else torch.cuda.get_device_name(context.device)
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    if peak is not None:
        found["mfu of the data sheet"] = found["flop per second"] / peak
    return found
