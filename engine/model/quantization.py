"""Quantised base models for QLoRA, through bitsandbytes and transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from .. import distributed
from ..config.schema import ModelConfig, Quantization
from ..errors import UserError
from .sources import hub_options

_STORED_KEYS = ("quantization_config", "compression_config")
"""Where configs say how weights are stored; the second is an older name."""


def check_quantization(model: ModelConfig) -> None:
    """Raise a ``UserError`` when a package is missing that quantises a base."""
    if not model.quantization:
        return
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"model.quantization={model.quantization} needs {' and '.join(missing)}: pip install dpo-kernels[qlora]"
        )


def check_trainable(model: ModelConfig) -> None:
    """Raise a ``UserError`` when all weights of a checkpoint would be trained that is stored quantised.

    Its config says so; no weight is read. A config that does not load is left to the loading of the model.
    """
    if model.trains_adapter:
        return
    kind = stored_quantization(model)
    if kind is not None:
        raise UserError(
            f"model.model_name_or_path={model.model_name_or_path} is stored quantised ({kind}), and quantised weights "
            "cannot be trained: train an adapter on it (set a key of model.lora), or give the checkpoint in bfloat16 "
            "or float32"
        )


def stored_quantization(model: ModelConfig) -> str | None:
    """How the weights of a checkpoint are quantised, in the words of its config, such as ``bitsandbytes, 4 bits``."""
    from transformers import PreTrainedConfig

    name = model.model_name_or_path
    try:
        # Of any architecture, also one whose code comes with the checkpoint.
        options = hub_options(name, "model.model_name_or_path=")
        values, _ = PreTrainedConfig.get_config_dict(name, revision=model.revision, **options)
    except (OSError, ValueError):
        return None
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    found = [part[key] for part in parts for key in _STORED_KEYS if part.get(key)]
    if not found:
        return None
    settings = found[0]
    method = settings.get("quant_method") or settings.get("quant_algo") or "by a method that it does not name"
    bits = settings.get("bits") or next((b for b in (4, 8) if settings.get(f"load_in_{b}bit")), None)
    return f"{method}, {bits} bits" if bits else str(method)


def read_by_each(model: ModelConfig) -> bool:
    """Whether each of several processes reads the weights itself: quantised ones do not travel."""
    return distributed.size() > 1 and bool(model.quantization or stored_quantization(model))


def quantization_arguments(kind: Quantization, device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise every linear layer but the head while the weights are read.

    The scales are quantised, too, as in the QLoRA paper (arXiv 2305.14314).
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def use_one_product(model: nn.Module) -> None:
    """On CPUs with AVX-512, bitsandbytes repacks weights in evaluation and computes with them in bfloat16.

    The reference would then be another function than the policy that trains.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not a declared attribute of modules


def num_weights(parameter: nn.Parameter) -> int:
    """Entries of a weight; of a quantised one, those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
