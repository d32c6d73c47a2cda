"""The head of a transformers causal language model as the record that ``dpo_kernels`` takes."""

from __future__ import annotations

from torch import nn

from dpo_kernels.head import Head

from ..errors import UserError

# What models call a factor of their logits, and whether they multiply (1) or divide (-1) by it.
_FACTORS = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "logits_scaling": -1,
    "logits_mup_width_multiplier": -1,
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The same name with the opposite meaning.
_EXCEPTIONS = {"hyperclovax": {"logits_scaling": 1}}


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
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    scale = 1.0
    for attribute, power in (_FACTORS | _EXCEPTIONS.get(config.model_type, {})).items():
        scale *= float(getattr(config, attribute, None) or 1.0) ** power
    return Head(layer.weight, layer.bias, softcap, scale)
