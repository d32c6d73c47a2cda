"""The head of a transformers causal language model as the record that ``dpo_kernels`` takes."""

from __future__ import annotations

from torch import nn

from dpo_kernels.head import Head
from dpo_kernels.hf import logit_options

from ..errors import UserError


def read_head(model: nn.Module) -> Head:
    """The head of a transformers causal language model.

    Softcap and scale are read from the text config under the names that transformers models use. Where a model does
    more than its config says, the start-up check finds other log-probs and refuses it.

    Raises:
        UserError: no linear output layer, or adapters on it.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    name = type(model).__name__
    if hasattr(layer, "base_layer"):
        raise UserError(f"{name}: adapters on the output layer are not supported; leave lm_head out of target_modules")
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{name}: the output layer is {type(layer).__name__}, expected a linear layer")
    softcap, scale = logit_options(model.config.get_text_config())  # type: ignore[union-attr, operator]
    return Head(layer.weight, layer.bias, softcap, scale)
