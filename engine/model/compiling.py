"""How functions are compiled here: once for all lengths, and to the same sums in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_VARIANTS = 64
"""Of a function's code: by class of layer, by gradients or none, by adapters on or off. torch allows 8."""


def allow_variants() -> None:
    """Let torch compile as many graphs of one function as models need of it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)


def compile_for_all_lengths(
    function: Callable[..., Any], backend: Any, *, fullgraph: bool = False
) -> Callable[..., Any]:
    """A function compiled by a backend of ``torch.compile``, by name or itself; lengths are symbols from the start."""
    options: dict[str, Any] = {}
    if backend == "inductor" and "deterministic" in torch._inductor.list_options():
        # else it tries several kernels on the device and takes the fastest, whose sums may add in another order
        options = {"options": {"deterministic": True}}
    return torch.compile(function, dynamic=True, fullgraph=fullgraph, backend=backend, **options)
