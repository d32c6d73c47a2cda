"""The head of a transformers causal language model as the record that ``dpo_kernels`` takes.

Adapters on it make it wider, as ``dpo_kernels.adapters`` says.

Legend: N tokens, D features, V vocabulary, R ranks of adapters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dpo_kernels.adapters import active_copy, as_linear, with_adapters
from dpo_kernels.head import Head
from dpo_kernels.hf_config import logit_options

from ..errors import UserError


def output_layer(model: nn.Module) -> nn.Linear:
    """The linear layer that gives the logits of a transformers causal language model.

    Of an output layer with low-rank adapters this is the layer below them; of trained copies, the one that is on.

    Raises:
        UserError: no linear output layer.
    """
    layer = active_copy(model.get_output_embeddings())  # type: ignore[operator]
    layer = getattr(layer, "base_layer", layer)
    name = type(model).__name__
    if layer is None:
        raise UserError(f"{name} has no output layer (lm_head): give a model that was made to write text")
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{name}: the output layer is {type(layer).__name__}, expected a linear layer")
    return layer


def read_head(model: nn.Module) -> Head:
    """The head of a transformers causal language model, that of ``output_layer``.

    Softcap and scale are read from the text config under the names that transformers models use. Where a model does
    more than its config says, the start-up check finds other log-probs and has it run in rows.

    Raises:
        UserError: no linear output layer.
    """
    weight_VD, bias_V = as_linear(output_layer(model))
    softcap, scale = logit_options(model.config.get_text_config())  # type: ignore[union-attr, operator]
    return Head(weight_VD, bias_V, softcap, scale)


def adapted_head(model: nn.Module, hidden_ND: Tensor) -> tuple[Tensor, Head]:
    """Hidden states and the head of a model, both wider by the adapters on the output layer that are on, if any are.

    Args:
        hidden_ND: what the output layer is given.

    Returns:
        [N, D + R] and a head of as many features, whose logits are those of the adapted layer.

    Raises:
        UserError: adapters that are no product with one weight.
    """
    head = read_head(model)
    layer = active_copy(model.get_output_embeddings())  # type: ignore[operator]
    if not hasattr(layer, "base_layer"):
        return hidden_ND, head
    try:
        wide_NE, weight_VE, bias_V = with_adapters(layer, hidden_ND, head.weight_VD, head.bias_V)
    except ValueError as error:
        raise UserError(str(error)) from error
    return wide_NE, head._replace(weight_VD=weight_VE, bias_V=bias_V)


def head_words(model: Any) -> str:
    """What is trained of the output layer of a model with adapters."""
    layer = model.get_output_embeddings()
    ranks = (
        [layer.r[name] for name in layer.active_adapters if name in layer.lora_A] if hasattr(layer, "lora_A") else []
    )
    if hasattr(layer, "original_module"):
        return "a trained copy of the output layer (modules_to_save)"
    words = [f"frozen, with adapters of rank {ranks[0]}" if ranks else "frozen"]
    if output_layer(model).weight is model.get_input_embeddings().weight:
        words.append("tied to the embeddings" + (", which have none" if ranks else ""))
    return ", ".join(words)
