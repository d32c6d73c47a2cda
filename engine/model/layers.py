"""What a transformers config says of its layers, which may differ: Gemma 4 has two head dimensions."""

from __future__ import annotations

from typing import Any


def layer_configs(config: Any) -> list[Any]:
    """The config of every layer of a text model, in order. Attributes that differ raise when read from ``config``."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def largest(config: Any, *names: str) -> int:
    """The largest value that an attribute of one of these names has in a layer; 0 where no layer has one."""
    layers = layer_configs(config) if getattr(config, "is_heterogeneous", False) else [config]
    return max((getattr(layer, name, None) or 0 for layer in layers for name in names), default=0)
