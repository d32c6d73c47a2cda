"""FlexAttention on the CPU: torch's own plain mathematics of it, which refuses what the kernels for CUDA refuse.

``torch.compile`` traces as it does for a GPU, so graphs and recompilations are real; what it has traced runs as it is.
The refusals are those of ``torch/nn/attention/flex_attention.py`` and of the lowering to Triton in
``torch/_inductor/kernel/flex`` (the same in torch 2.11, 2.13 and 2.15).
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as library

from engine.model.attention import choice, flex

BLOCKS = (16, 32, 64, 128)
"""Of queries and keys that its kernels work on, by chip, dtype and width."""
_attention = library.flex_attention


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FlexAttention run on the CPU, gradients included."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forget()
    monkeypatch.setattr(flex, "BACKEND", "eager")
    monkeypatch.setattr(choice, "KERNEL_DEVICES", ("cpu", "cuda"))
    # its refusal of gradients on the CPU
    monkeypatch.setattr(library, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(library, "flex_attention", checked)


def forget() -> None:
    """Nothing compiled, and nothing tried, is left."""
    flex._compiled.cache_clear()
    flex._try.cache_clear()


def graphs() -> int:
    """How many were compiled since ``install``."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def checked(query, key, value, *args: Any, **options: Any):
    given = inspect.signature(_attention).bind(query, key, value, *args, **options).arguments
    mask = given["block_mask"]
    if query.size(-1) < 16 or value.size(-1) < 16:
        raise NotImplementedError("NYI: embedding dimension of the query, key, and value must be at least 16")
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise ValueError("Backward pass with mixed query, key, and value dtype is not supported")
    if any(size % block for size in mask.BLOCK_SIZE for block in BLOCKS):
        raise ValueError("Q and KV block size must be divisible by BLOCK_M and BLOCK_N.")
    if any(x.dtype != torch.int32 for x in (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices)):
        raise ValueError("its kernels read places of 32 bits")
    if not isinstance(given["scale"], float):
        raise ValueError("the scale is a constant of the kernel")
    return _attention(query, key, value, *args, **options)
