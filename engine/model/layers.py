"""Which layers of a model compute text, and what its config says of them; they may differ: Gemma 4 has two head
dimensions.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def text_model(causal_lm: Any) -> nn.Module:
    """The part of a transformers model that computes text: all of it, but for composites of several models.

    What composites have beside it, such as a vision tower and what projects its output, no text ever reaches.
    """
    if causal_lm.config.get_text_config() is causal_lm.config:
        return causal_lm
    return causal_lm.get_decoder()


def layer_configs(config: Any) -> list[Any]:
    """The config of every layer of a text model, in order. Attributes that differ raise when read from ``config``."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def largest(config: Any, *names: str) -> int:
    """The largest value that an attribute of one of these names has in a layer; 0 where no layer has one."""
    layers = layer_configs(config) if getattr(config, "is_heterogeneous", False) else [config]
    return max((getattr(layer, name, None) or 0 for layer in layers for name in names), default=0)
