"""What the config of a Hugging Face model says of its output layer and of its experts, under many names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_FACTORS = {
    "logit_scale": 1,
    "output_multiplier": 1,
    "lm_head_multiplier": 1,
    "logits_scaling": -1,
    "logits_mup_width_multiplier": -1,
}
"""What models call a factor of their logits, and whether they multiply (1) or divide (-1) by it."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_EXCEPTIONS = {"hyperclovax": {"logits_scaling": 1}}
"""The same name with the opposite meaning."""
EXPERT_CHOICES = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k")
"""What models call the number of experts that a token goes to."""


def logit_options(text_config: Any) -> tuple[float | None, float]:
    """Softcap and factor of the raw logits, under the names that transformers models give them in their text config."""
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(text_config, name, None))), None)
    scale = 1.0
    for name, power in (_FACTORS | _EXCEPTIONS.get(text_config.model_type, {})).items():
        scale *= float(getattr(text_config, name, None) or 1.0) ** power
    return softcap, scale


def router_loss(text_config: Any, router_logits: Any, attention_mask: Tensor | None) -> Any:
    """Load-balancing loss of a mixture of experts; every such family in transformers has the one of Mixtral.

    Raises:
        ValueError: the model returns no router logits, or its config does not say how many experts a token goes to.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    num_experts = getattr(text_config, "num_experts", None) or getattr(text_config, "num_local_experts", None)
    if router_logits is None or num_experts is None:
        raise ValueError(f"output_router_logits=True, but {text_config.model_type} returns no router logits")
    top_k = next((k for name in EXPERT_CHOICES if (k := getattr(text_config, name, None))), None)
    if top_k is None:
        raise ValueError(
            f"output_router_logits=True, but the config of {text_config.model_type} has none of "
            f"{', '.join(EXPERT_CHOICES)}, the experts that a token goes to: set it, or set output_router_logits to "
            "False"
        )
    return load_balancing_loss_func(router_logits, num_experts, top_k, attention_mask)
