"""The products of low-rank adapters on linear layers, under autocast: fewer passes over what a layer takes and gives.

Of a layer y = W x with an adapter, y + s B A x, peft widens x to float32, which autocast narrows again (of a quantised
layer it copies y instead); then it writes B A x, scales it and adds it, each in a pass of its own, and backward takes
such passes as well. Here x goes into the product as it is, and the second product adds to y what it gives, scaled
(``torch.addmm``) and rounded once; on the way back the gradient of the sum serves both. Without autocast, and for
adapters that are more than these two products, peft's own forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_KINDS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
)
"""peft's classes of adapted linear layers; naming them imports no bitsandbytes."""


def join_products(model: nn.Module) -> None:
    """Have the adapted linear layers of a model compute as above. Call it again when adapters were added."""
    for module in model.modules():
        if _has_products(module) and not isinstance(vars(module).get("forward"), Joined):
            vars(module)["forward"] = Joined(module)


def _has_products(module: nn.Module) -> bool:
    # sharding derives a class of its own
    kind = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return (kind.__module__, kind.__name__) in _KINDS


class Joined:
    """The forward of an adapted layer. It names the layer, so that a copy of a model has copies of its own."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        name = _plain_adapter(layer)
        if name is None or args or kwargs or not _is_cast_to(x):
            return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        result = layer.base_layer(x)
        down, up, scaling = layer.lora_A[name](x), layer.lora_B[name], layer.scaling[name]
        if result.dtype != x.dtype:
            return (result + up(down) * scaling).to(result.dtype)  # type: ignore[no-any-return]
        width, rank = up.weight.shape
        matrices = result.reshape(-1, width), down.reshape(-1, rank), up.weight.t()
        return torch.addmm(*matrices, alpha=scaling).view_as(result)


def _plain_adapter(layer: Any) -> str | None:
    """The name of the one adapter that is on, if it is two products and nothing more."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias.get(active[0]):
        return None
    dropout = layer.lora_dropout[active[0]]
    drops = not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0
    return None if drops else active[0]


def _is_cast_to(x: torch.Tensor) -> bool:
    """Whether autocast is on, in the dtype of a tensor."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind)
