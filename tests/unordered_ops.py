"""Which operations add, or write, in an order that differs between two runs on a GPU.

From what ``torch.use_deterministic_algorithms`` documents (torch 2.13) and from the kernels. An operation that is
unordered only where an index occurs twice, or only for floating-point numbers, is judged by what it is given.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tests.pretended_cuda import on_host

ALWAYS = (
    "_ctc_loss_backward",
    "_embedding_bag_backward",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool3d_backward",
    "convolution_backward",
    "cudnn_convolution",
    "fractional_max_pool",
    "grid_sampler",
    "kthvalue",
    "max_pool3d_with_indices_backward",
    "max_unpool",
    "median",
    "nll_loss2d",
    "reflection_pad",
    "replication_pad",
    "upsample",
)
"""Beginnings of names."""
FLOATS = ("bincount", "cumprod", "cumsum", "histc", "logcumsumexp")
BY_INDEX = {"index_add": 2, "index_copy": 2, "put": 1, "scatter": 2, "scatter_add": 2}
BY_INDEX["scatter_reduce"] = 2
FUSED_ATTENTION = re.compile(r"_(scaled_dot_product|flash|efficient|cudnn)_\w*attention\w*_backward")
"""Add the gradient of queries in whatever order blocks of keys finish, unless deterministic algorithms are on."""


def unordered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a GPU may give other bits the next time."""
    name = func._schema.name.split("::")[1].removesuffix("_")
    args = tuple(map(on_host, args))
    if name.startswith(ALWAYS):
        return True
    if FUSED_ATTENTION.fullmatch(name):
        return not torch.are_deterministic_algorithms_enabled()
    if name in FLOATS:
        return args[0].is_floating_point() or isinstance(kwargs.get("weights"), Tensor)
    if name in BY_INDEX and isinstance(args[BY_INDEX[name]], Tensor):
        return _occurs_twice(args[BY_INDEX[name]], args[1] if name.startswith("scatter") else 0)
    if name in ("index_put", "_index_put_impl", "_unsafe_index_put"):
        # With accumulate a GPU sorts the indices first.
        accumulates = (len(args) > 3 and args[3]) or kwargs.get("accumulate")
        return not accumulates and _occurs_twice(_joined([on_host(i) for i in args[1]], args[0].shape), 0)
    return False


def _occurs_twice(index: Tensor, dim: int) -> bool:
    if index.ndim == 0:
        return False
    ordered = index.sort(dim=dim).values
    return bool((ordered.diff(dim=dim) == 0).any())


def _joined(indices: list[Tensor | None], shape: torch.Size) -> Tensor:
    """One number for each place that several indices name together."""
    given = [(i, size) for i, size in zip(indices, shape, strict=False) if i is not None]
    flat = torch.zeros((), dtype=torch.int64)
    for index, size in given:
        flat = flat * size + index
    return flat.flatten()
