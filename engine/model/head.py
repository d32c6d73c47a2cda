"""The language-model head as data: what turns a hidden state into logits.

logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from engine.errors import UserError


class Head(NamedTuple):
    """Weight and options of a language-model head, in the terms of ``dpo_kernels``."""

    weight: torch.Tensor
    """[V, D]."""
    bias: torch.Tensor | None
    """[V]."""
    softcap: float | None
    logit_scale: float

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``linear_logps`` and ``linear_dpo_loss``."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def read_head(model: nn.Module) -> Head:
    """The head of a transformers causal language model.

    Softcap and scale are read from the text config under the names that transformers models use:
    ``final_logit_softcapping`` (Gemma), ``logit_scale`` (Cohere: multiplies), ``logits_scaling`` (Granite: divides).

    Raises:
        UserError: no linear output layer, or adapters on it.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    name = type(model).__name__
    if hasattr(layer, "base_layer"):
        raise UserError(f"{name}: adapters on the output layer are not supported; leave lm_head out of target_modules")
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{name}: the output layer is {type(layer).__name__}, expected a linear layer")
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, layer.bias, softcap, float(scale) / float(divisor))
