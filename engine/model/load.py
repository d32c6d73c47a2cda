"""Models and tokenizers from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.model.attention import choose_backend, register_backends
from engine.model.policy import Policy

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device() -> torch.device:
    """The device to train on: the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(model: ModelConfig):
    """The tokenizer of a model.

    Raises:
        UserError: there is none at the given place.
    """
    from transformers import AutoTokenizer

    source = model.tokenizer_name_or_path or model.model_name_or_path
    field = "tokenizer_name_or_path" if model.tokenizer_name_or_path else "model_name_or_path"
    _check_folder(source, field)
    try:
        return AutoTokenizer.from_pretrained(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"model.{field}={source} has no tokenizer that loads: {_first_line(error)}; "
            "set model.tokenizer_name_or_path to a folder or Hub id that has one"
        ) from error


def load_policy(model: ModelConfig, *, device: torch.device, gradient_checkpointing: bool = False) -> Policy:
    """Load a causal language model for training or scoring on packs.

    Trained parameters are float32. With LoRA the frozen base is held in the compute dtype. Dropout is disabled
    everywhere: policy and reference must be the same function before the first step.

    Raises:
        UserError: the model cannot be loaded or lacks what packs need.
    """
    from transformers import AutoModelForCausalLM

    register_backends()
    compute_dtype = DTYPES[model.dtype]
    backend = choose_backend(model.attention, device, compute_dtype)
    _check_folder(model.model_name_or_path, "model_name_or_path")
    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=compute_dtype if model.lora else torch.float32,
            attn_implementation=backend.implementation,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"model.model_name_or_path={model.model_name_or_path} does not load as a causal language model: "
            f"{_first_line(error)}"
        ) from error
    if getattr(causal_lm.config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"model.model_name_or_path={model.model_name_or_path}: its config sets output_router_logits, "
            "which asks for an auxiliary router loss that packs do not compute; set it to false in config.json"
        )
    disable_dropout(causal_lm)
    if gradient_checkpointing:
        if not causal_lm.supports_gradient_checkpointing:
            raise UserError(
                f"{type(causal_lm).__name__} does not support gradient checkpointing: "
                "set train.gradient_checkpointing to false"
            )
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy_model: nn.Module = add_lora(causal_lm, model.lora) if model.lora else causal_lm
    policy = Policy(policy_model.to(device), backend=backend, compute_dtype=compute_dtype)
    assert policy.head is not None
    return policy


def add_lora(causal_lm: nn.Module, lora: LoraConfig) -> nn.Module:
    """Wrap a model with fresh adapters in float32; the base is frozen."""
    try:
        import peft
    except ImportError as error:
        raise UserError("model.lora needs peft: pip install dpo-kernels[peft]") from error
    targets = lora.target_modules
    try:
        adapted = peft.get_peft_model(
            causal_lm,  # type: ignore[arg-type]
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(targets) if isinstance(targets, tuple) else targets,
            ),
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={lora.target_modules}: {_first_line(error)}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout probability to 0; returns how many were not."""
    active = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    for module in active:
        module.p = 0.0
    return len(active)


def _check_folder(source: str, field: str) -> None:
    """A path that looks local must be a folder; otherwise transformers would look for it on the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"model.{field}={source} is not a folder: give a model folder or a Hub id such as org/name")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
