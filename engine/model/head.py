"""The head of a transformers causal language model as the record that ``dpo_kernels`` takes.

Adapters on it are columns of a wider head: W x + s B A x is [W, B] [x, s A x]. So dropout in front of A is what peft
computes, an update that is small beside W is not rounded to the digits of W, and gradients reach A and B by autograd.
The wider weight is the only copy that is made. DoRA scales its rows.

Legend: N tokens, D features, V vocabulary, R ranks of adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels.head import Head
from dpo_kernels.hf import logit_options

from ..errors import UserError

_ALIGNED = 16
"""Features of a wider head are a multiple of this, so that its rows start where tensor cores can load them."""


def read_head(model: nn.Module) -> Head:
    """The head of a transformers causal language model.

    Softcap and scale are read from the text config under the names that transformers models use. Where a model does
    more than its config says, the start-up check finds other log-probs and refuses it.

    Of an output layer with low-rank adapters this is the layer below them; of trained copies, the one that is on.

    Raises:
        UserError: no linear output layer.
    """
    layer = _active_copy(model.get_output_embeddings())  # type: ignore[operator]
    layer = getattr(layer, "base_layer", layer)
    name = type(model).__name__
    if layer is None:
        raise UserError(f"{name} has no output layer (lm_head): give a model that was made to write text")
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{name}: the output layer is {type(layer).__name__}, expected a linear layer")
    softcap, scale = logit_options(model.config.get_text_config())  # type: ignore[union-attr, operator]
    return Head(layer.weight, layer.bias, softcap, scale)


def adapted_head(model: nn.Module, hidden_ND: Tensor) -> tuple[Tensor, Head]:
    """Hidden states and the head of a model, both wider by the adapters on the output layer that are on, if any are.

    Args:
        hidden_ND: what the output layer is given.

    Returns:
        [N, D + R] and a head of as many features, whose logits are those of the adapted layer.
    """
    head = read_head(model)
    layer: Any = _active_copy(model.get_output_embeddings())  # type: ignore[operator]
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return hidden_ND, head
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return hidden_ND, head
    rows, columns, bias_V = [hidden_ND], [head.weight_VD], head.bias_V
    for name in names:
        lora_B = layer.lora_B[name]
        low_NR = layer.lora_A[name](layer.lora_dropout[name](hidden_ND)) * layer.scaling[name]
        rows.append(low_NR.to(hidden_ND.dtype))
        columns.append(lora_B.weight.to(head.weight_VD.dtype))
        if lora_B.bias is not None:
            extra_V = lora_B.bias * layer.scaling[name]
            bias_V = extra_V if bias_V is None else bias_V + extra_V
    if pad := -sum(part.shape[1] for part in rows) % _ALIGNED:
        rows.append(hidden_ND.new_zeros(len(hidden_ND), pad))
        columns.append(head.weight_VD.new_zeros(len(head.weight_VD), pad))
    weight_VE = torch.cat(columns, 1)
    if magnitudes := [name for name in names if name in layer.lora_magnitude_vector]:
        weight_VE = weight_VE * _dora_scale(layer, magnitudes[0], head.weight_VD).to(weight_VE.dtype)
    return torch.cat(rows, 1), head._replace(weight_VD=weight_VE, bias_V=bias_V)


def head_words(model: Any) -> str:
    """What is trained of the output layer of a model with adapters."""
    layer = model.get_output_embeddings()
    ranks = (
        [layer.r[name] for name in layer.active_adapters if name in layer.lora_A] if hasattr(layer, "lora_A") else []
    )
    if hasattr(layer, "original_module"):
        return "a trained copy of the output layer (modules_to_save)"
    words = [f"frozen, with adapters of rank {ranks[0]}" if ranks else "frozen"]
    if read_head(model).weight_VD is model.get_input_embeddings().weight:
        words.append("tied to the embeddings" + (", which have none" if ranks else ""))
    return ", ".join(words)


def _active_copy(layer: Any) -> Any:
    """The module that computes: of an output layer with trained copies (``modules_to_save`` of peft) the copy that is
    on, or the original.
    """
    if not hasattr(layer, "original_module"):
        return layer
    (name,) = layer.active_adapters or [None]
    on = not layer.disable_adapters and name in layer.modules_to_save
    return layer.modules_to_save[name] if on else layer.original_module


def _dora_scale(layer: Any, name: str, weight_VD: Tensor) -> Tensor:
    """[V, 1]: trained magnitude over the norm of the adapted row, which the paper takes as a constant (section 4.3)."""
    with torch.no_grad(), torch.autocast(weight_VD.device.type, enabled=False):
        lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
        adapted_VD = torch.addmm(weight_VD.to(lora_B.dtype), lora_B, lora_A, alpha=layer.scaling[name])
        norm_V = adapted_VD.norm(dim=1)
    return (layer.lora_magnitude_vector[name].weight / norm_V)[:, None]
