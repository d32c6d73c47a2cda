"""Models and tokenizers from a folder or the Hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.model.attention import choose_backend, register_backends
from engine.model.policy import Policy

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LOADED_ADAPTER = "loaded"
# Attributes that functional dropout, layer drop and router noise read, beside the `p` of dropout modules.
_RANDOM_ATTRIBUTE = re.compile(r"drop|jitter")


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
    check_folder(source, f"model.{field}=")
    try:
        return AutoTokenizer.from_pretrained(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if not Path(source).is_dir():
            raise _not_found(f"model.{field}={source}", error) from error
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
    check_folder(model.model_name_or_path, "model.model_name_or_path=")
    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=compute_dtype if model.lora else torch.float32,
            attn_implementation=backend.implementation,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not Path(model.model_name_or_path).is_dir():
            raise _not_found(f"model.model_name_or_path={model.model_name_or_path}", error) from error
        raise UserError(
            f"model.model_name_or_path={model.model_name_or_path} does not load as a causal language model: "
            f"{_first_line(error)}"
        ) from error
    if getattr(causal_lm.config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"model.model_name_or_path={model.model_name_or_path}: its config sets output_router_logits, "
            "which asks for an auxiliary router loss that packs do not compute; set it to false in config.json"
        )
    if getattr(causal_lm, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model.model_name_or_path={model.model_name_or_path} is an adapter, not a model: merge it into its base "
            "with peft's merge_and_unload, save the result and give that folder"
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


def load_adapter(policy: Policy, path: Path) -> None:
    """Put the adapter in folder ``path`` on ``policy``, with the rank and scale that it was trained with.

    An adapter that the policy has already stays where it is, switched off.

    Raises:
        UserError: not a low-rank adapter, or one of another model.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("an adapter needs peft: pip install dpo-kernels[peft]") from error
    model: Any = policy.model
    name = type(policy.causal_lm).__name__
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
        if config.peft_type != peft.PeftType.LORA:
            raise UserError(f"{path} is an adapter of kind {config.peft_type}: only LORA is supported")
        with warnings.catch_warnings():
            # peft loads what fits and warns of the rest, which is an error below
            warnings.simplefilter("ignore")
            if policy.has_adapter:
                model.load_adapter(str(path), _LOADED_ADAPTER)
                model.set_adapter(_LOADED_ADAPTER)
            else:
                policy.model = model = peft.PeftModel.from_pretrained(model, str(path), _LOADED_ADAPTER)
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        if stored != set(peft.get_peft_model_state_dict(model, adapter_name=_LOADED_ADAPTER)):
            raise ValueError("it belongs to other layers")
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"the adapter {path} does not fit {name}: {_first_line(error)}") from error


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout probability to 0, of dropout modules and of modules that call dropout as a function.

    Returns:
        How many were not 0.
    """
    active = [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and value > 0
        and ((name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)) or _RANDOM_ATTRIBUTE.search(name))
    ]
    for module, name in active:
        setattr(module, name, 0.0)
    return len(active)


def check_folder(source: str, option: str) -> None:
    """Raise a ``UserError`` unless a path that looks local is a folder; transformers would look for it on the Hub.

    Args:
        option: what the user wrote before ``source``, such as ``--model ``.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{option}{source} is not a folder: give a model folder or a Hub id such as org/name")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # a heading alone says nothing
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _not_found(what: str, error: BaseException) -> UserError:
    reason = _first_line(error).rstrip(".")
    return UserError(f"{what} is no folder here, and did not load from the Hub: {reason}; check the path or the Hub id")
