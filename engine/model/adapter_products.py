"""The products of low-rank adapters on linear layers, under autocast: fewer passes over what a layer takes and gives.

Of a layer y = W x with an adapter, y + s B A x, peft widens x to float32, which autocast narrows again (of a quantised
layer it copies y instead); then it writes B A x, scales it and adds it, each in a pass of its own, and backward takes
such passes as well. Here x goes into the product as it is, and the second product adds to y what it gives, scaled
(``torch.addmm``) and rounded once; on the way back the gradient of the sum serves both. Without autocast, and for
adapters that are more than these two products, peft's own forward runs.
"""

from __future__ import annotations

from types import MethodType
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
        kind = type(module)
        if (kind.__module__, kind.__name__) in _KINDS and "forward" not in vars(module):
            vars(module)["forward"] = MethodType(_forward, module)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = _plain_adapter(layer)
    if name is None or args or kwargs or not _is_cast_to(x):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    result = layer.base_layer(x)
    if result.dtype != x.dtype:
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    down = layer.lora_A[name](x)
    width, rank = layer.lora_B[name].weight.shape
    matrices = result.reshape(-1, width), down.reshape(-1, rank), layer.lora_B[name].weight.t()
    return torch.addmm(*matrices, alpha=layer.scaling[name]).view_as(result)


def _plain_adapter(layer: Any) -> str | None:
    """The name of the one adapter that is on, if it is two products and nothing more."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias.get(active[0]):
        return None
    return active[0] if isinstance(layer.lora_dropout[active[0]], nn.Identity) else None


def _is_cast_to(x: torch.Tensor) -> bool:
    """Whether autocast is on, in the dtype of a tensor."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind)
