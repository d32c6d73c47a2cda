"""How functions are compiled here: once for all lengths, and to the same sums in every run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.fx.experimental import _config as shapes

_VARIANTS = 64
"""Of a function's code: by class of layer, by gradients or none, by adapters on or off. torch allows 8."""


def compile_for_all_lengths(
    function: Callable[..., Any], backend: Any, *, fullgraph: bool = False
) -> Callable[..., Any]:
    """A function compiled by a backend of ``torch.compile``, by name or itself; lengths are symbols from the start.

    A length is a symbol of its own, even where the first pack has as many tokens, or tiles of them, as a layer has
    heads or features: torch would take equal sizes for one size, and compile again for the next pack.
    """
    options: dict[str, Any] = {}
    if backend == "inductor" and "deterministic" in torch._inductor.list_options():
        # else it tries several kernels on the device and takes the fastest, whose sums may add in another order
        options = {"options": {"deterministic": True}}
    compiled = torch.compile(function, dynamic=True, fullgraph=fullgraph, backend=backend, **options)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # at each call, since settings are a thread's own from torch 2.13 on, and checkpoints run in one of autograd
        limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
        apart = shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        with torch._dynamo.config.patch(recompile_limit=limit), apart:
            return compiled(*args, **kwargs)

    return run
