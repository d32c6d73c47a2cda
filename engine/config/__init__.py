"""The run configuration: schema, YAML, command-line overrides, converters."""

from .help import config_help, format_diff
from .load import build_config, diff_from_defaults, load_config, to_dict, to_yaml
from .schema import (
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PackingConfig",
    "ReferenceConfig",
    "RunConfig",
    "TrainConfig",
    "build_config",
    "config_help",
    "diff_from_defaults",
    "format_diff",
    "load_config",
    "to_dict",
    "to_yaml",
]
