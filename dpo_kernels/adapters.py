"""Adapters on the output layer of a model, as more features of the head.

W x + s B A x is [W, B] [x, s A x]: the update is neither rounded to the digits of W nor added to it, dropout in front
of A is what peft computes, and gradients reach A and B by autograd. The wider weight is the only copy that is made.
DoRA scales its rows.

Legend: T rows, D features, V vocabulary, r rank, E features with those of adapters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

FEATURES_MULTIPLE = 16
"""Features of a wider head are a multiple of this, so that its rows start where kernels load them at once."""


def whole(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered; its gradient is the mean over ranks, as data parallelism defines it."""
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full


def active_copy(layer: Any) -> Any:
    """The module that computes: of an output layer with trained copies (``modules_to_save`` of peft) the copy that is
    on, or the original.
    """
    if not hasattr(layer, "original_module"):
        return layer
    (name,) = layer.active_adapters[:1] or [None]
    on = not layer.disable_adapters and name in layer.modules_to_save
    return layer.modules_to_save[name] if on else layer.original_module


def as_linear(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an output layer that is a kind of ``nn.Linear``.

    One with a forward of its own, such as a factor for each row (Dory), is asked what it makes of the unit vectors:
    that is its weight, if it is linear. Gradients reach all that it consists of.

    Returns:
        [V, D] and [V].

    Raises:
        ValueError: a layer with its own forward whose parameters are spread over processes.
    """
    if _is_plain(layer):
        return layer.weight, layer.bias
    forward: Any = type(layer).forward
    weight = layer.weight
    if isinstance(weight, DTensor):
        raise ValueError(f"the output layer is {type(layer).__name__}, which computes on whole weights alone")
    with torch.autocast(weight.device.type, enabled=False):
        units_DD = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        rows_DV = forward(layer, units_DD)
        if layer.bias is None:
            return rows_DV.T.contiguous(), None
        bias_V = forward(layer, units_DD.new_zeros(1, len(units_DD)))[0]
        return (rows_DV - bias_V).T.contiguous(), bias_V


def _is_plain(layer: Any) -> bool:
    return type(layer).forward is torch.nn.Linear.forward


def with_adapters(
    layer: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, weight and bias, all wider by the LoRA and DoRA adapters of a layer that are on, if any are.

    Args:
        layer: of peft, around a linear layer.
        hidden_TD: what the layer is given.
        weight_VD, bias_V: of the linear layer.

    Returns:
        [T, E], [V, E] and [V], whose product is that of the adapted layer.

    Raises:
        ValueError: adapters that are no product with one weight.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names or layer.disable_adapters or layer.merged:
        return hidden_TD, weight_VD, bias_V
    dora = _check_variants(layer, names)
    features, columns = [hidden_TD], [weight_VD]
    for name in names:
        down, up = whole(layer.lora_A[name].weight), whole(layer.lora_B[name].weight)
        dropped_TD = layer.lora_dropout[name](hidden_TD)
        down_Tr = F.linear(dropped_TD.to(down.dtype), down) * layer.scaling[name]
        features.append(down_Tr.to(hidden_TD.dtype))
        columns.append(up.to(weight_VD.dtype))
        up_bias = layer.lora_B[name].bias
        if up_bias is not None:
            shift = whole(up_bias) * layer.scaling[name]
            bias_V = (shift if bias_V is None else bias_V + shift).to(weight_VD.dtype)
    padding = -sum(part.shape[1] for part in columns) % FEATURES_MULTIPLE
    weight_VE = F.pad(torch.cat(columns, 1), (0, padding))
    if dora:
        own_VD = weight_VD if _is_plain(layer.base_layer) else layer.base_layer.weight
        weight_VE = weight_VE * _dora_scale(layer, names[0], own_VD).to(weight_VE.dtype)
    return F.pad(torch.cat(features, 1), (0, padding)), weight_VE, bias_V


def _check_variants(layer: Any, names: list[str]) -> bool:
    """Whether the adapter is DoRA. ValueError for what is neither that nor LoRA."""
    kinds = {name: type(kind).__name__ for name, kind in getattr(layer, "lora_variant", {}).items() if name in names}
    for name, kind in kinds.items():
        dropout = layer.lora_dropout[name]
        if kind != "DoraLinearVariant":
            reason = f"{kind.removesuffix('Variant')}, expected LoRA or DoRA"
        elif len(names) > 1:
            reason = "DoRA beside another adapter, expected one alone"
        elif dropout.training and getattr(dropout, "p", 0):
            reason = "DoRA with dropout, which is no product with one weight: set lora_dropout to 0"
        else:
            continue
        raise ValueError(f"adapter {name!r} on the output layer is {reason}; or leave lm_head out")
    return bool(kinds)


def _dora_scale(layer: Any, name: str, weight_VD: Tensor) -> Tensor:
    """[V, 1]: trained magnitude over the norm of the adapted row, which the paper takes as a constant (section 4.3)."""
    with torch.no_grad(), torch.autocast(weight_VD.device.type, enabled=False):
        lora_A, lora_B = whole(layer.lora_A[name].weight), whole(layer.lora_B[name].weight)
        adapted_VD = torch.addmm(weight_VD.to(lora_B.dtype), lora_B, lora_A, alpha=layer.scaling[name])
        norm_V = adapted_VD.norm(dim=1)
    return (whole(layer.lora_magnitude_vector[name].weight) / norm_V)[:, None]
