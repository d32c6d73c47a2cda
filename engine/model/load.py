"""Models and tokenizers from a folder or the Hub."""

from __future__ import annotations

import inspect
import re
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import distributed
from ..config.schema import ModelConfig
from ..config.training import Recomputed
from ..errors import UserError
from .adapters import FROZEN, add_lora, continue_adapter, hold_adapters
from .attention import Backend, choose_backend, register_backends
from .composites import empty_causal_lm, read_causal_lm
from .experts import EXPERTS, register_experts
from .head import output_layer
from .policy import Policy
from .quantization import check_quantization, quantization_arguments, read_by_each, use_one_product
from .recompute import checkpointing_options
from .sources import check_folder, first_line, hide_weight_bars, hub_options, needs_own_code, not_found
from .tokenizer import not_a_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Attributes that functional dropout, layer drop and router noise read, beside the `p` of dropout modules.
_RANDOM_ATTRIBUTE = re.compile(r"drop|jitter")


def resolve_device() -> torch.device:
    """The device to train on: the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _damaged(folder: Path) -> Path | None:
    """The first file of weights that does not open."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file
    return None


def load_policy(
    model: ModelConfig,
    *,
    device: torch.device,
    gradient_checkpointing: Recomputed = False,
    empty: bool = False,
    layers: int | None = None,
    weights_dtype: str = "float32",
    backend: Backend | None = None,
) -> Policy:
    """Load a causal language model for training or scoring on packs.

    With adapters the frozen base is held in the compute dtype, or quantised. Dropout is disabled everywhere: policy and
    reference must be the same function before the first step.

    Of several processes, rank 0 holds it on the CPU and the others have its shapes, until ``shard_policy`` spreads it
    over their devices. A quantised model is read by each of them.

    Args:
        empty: build the model from its config, and leave it where it is built: for shapes alone, or for speed.
        layers: how many of its layers an empty model has; all by default.
        weights_dtype: what the weights of a full model, and adapters, are held in: see ``optim.master_weights``.
        backend: how attention is computed; by default what the configuration asks for.

    Raises:
        UserError: the model cannot be loaded or lacks what packs need.
    """
    check_quantization(model)
    backend = backend or choose_backend(model.attention, device, DTYPES[model.dtype])
    if not empty:
        distributed.announce("reads the model")
    each = read_by_each(model)
    with distributed.main_first(), shapes_alone(model):
        return _load(
            model,
            device=device if distributed.size() == 1 or each else torch.device("cpu"),
            backend=backend,
            gradient_checkpointing=gradient_checkpointing,
            empty=empty or not (distributed.is_main() or each),
            layers=layers,
            weights_dtype=DTYPES[weights_dtype],
        )


def shapes_alone(model: ModelConfig) -> AbstractContextManager[Any]:
    """What is built inside has no data on the processes that get theirs from rank 0."""
    return nullcontext() if distributed.is_main() or read_by_each(model) else torch.device("meta")


def _load(
    model: ModelConfig,
    *,
    device: torch.device,
    backend: Backend,
    gradient_checkpointing: Recomputed,
    empty: bool,
    layers: int | None,
    weights_dtype: torch.dtype,
) -> Policy:
    held = DTYPES[model.dtype] if model.trains_adapter or model.quantization else weights_dtype
    causal_lm, obstacle = _read_causal_lm(model, device, backend, held, empty, layers)
    disabled = disable_dropout(causal_lm)
    if model.quantization:
        use_one_product(causal_lm)
    if gradient_checkpointing:
        if not causal_lm.supports_gradient_checkpointing:
            raise UserError(
                f"{type(causal_lm).__name__} does not support gradient checkpointing: "
                "set train.gradient_checkpointing to false"
            )
        causal_lm.gradient_checkpointing_enable(checkpointing_options(gradient_checkpointing))
    policy_model: nn.Module = causal_lm
    if model.lora:
        policy_model = add_lora(causal_lm, model.lora)
    elif model.adapter_name_or_path:
        policy_model = continue_adapter(causal_lm, model.adapter_name_or_path, empty=empty)
    if model.trains_adapter:
        hold_adapters(policy_model, weights_dtype)
    policy = Policy(
        policy_model if empty else policy_model.to(device),
        backend=backend,
        compute_dtype=DTYPES[model.dtype],
        reference_adapter=FROZEN if model.adapter_name_or_path else None,
    )
    policy.disabled_dropouts = disabled
    policy.obstacle = obstacle
    policy.recomputes = bool(gradient_checkpointing)
    output_layer(causal_lm)
    return policy


def _read_causal_lm(
    model: ModelConfig, device: torch.device, backend: Backend, held: torch.dtype, empty: bool, layers: int | None
) -> tuple[Any, str | None]:
    """The transformers model, with its weights unless ``empty``; and why its attention cannot run on packs, if so."""
    register_backends()
    register_experts()
    compute_dtype = DTYPES[model.dtype]
    source = f"model.model_name_or_path={model.model_name_or_path}"
    check_folder(model.model_name_or_path, "model.model_name_or_path=")
    options = hub_options(model.model_name_or_path, "model.model_name_or_path=")
    if model.quantization:
        options |= quantization_arguments(model.quantization, device, compute_dtype)
    if empty:
        options["layers"] = layers
    hide_weight_bars()
    read: Any = partial(
        _from_config if empty else read_causal_lm,
        model.model_name_or_path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=held,
        experts_implementation=EXPERTS,
        **options,
    )
    obstacle = None
    try:
        try:
            causal_lm = read(attn_implementation=backend.implementation)
        except (ValueError, KeyError) as error:
            if backend.implementation not in str(error):
                raise
            obstacle = "its model does not use transformers' AttentionInterface"
            causal_lm = read()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if (own_code := needs_own_code(source, error)) is not None:
            raise own_code from error
        if not Path(model.model_name_or_path).is_dir():
            raise not_found(source, error) from error
        why = first_line(error)
        if isinstance(error, SafetensorError) and (file := _damaged(Path(model.model_name_or_path))) is not None:
            why = f"{file.name} is damaged ({why}); copy it again"
        raise UserError(f"{source} does not load as a causal language model: {why}") from error
    if getattr(causal_lm, "_hf_peft_config_loaded", False):
        raise not_a_model(source)
    return causal_lm, obstacle


def _from_config(
    name: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
    layers: int | None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """As ``from_pretrained``, with the initial weights of the architecture."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only
    )
    if layers is not None:
        text = config.get_text_config()
        depth = text.num_hidden_layers
        for name, value in list(vars(text).items()):
            # what each layer is, by whatever name
            if ("layer" in name or "block" in name) and isinstance(value, list | tuple) and len(value) == depth:
                setattr(text, name, value[:layers])
        if shared := getattr(text, "num_kv_shared_layers", None):
            # the last layers use the keys of earlier ones (Gemma 3n)
            text.num_kv_shared_layers = max(0, layers - (depth - shared))
        text.num_hidden_layers = layers
    return empty_causal_lm(config, trust_remote_code=trust_remote_code, **kwargs).eval()


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout probability to 0, of dropout modules and of modules that call dropout as a function; routers
    with noise stay in evaluation.

    Returns:
        How many were not 0.
    """
    active = [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and value > 0
        and not ("jitter" in name and hasattr(module, "mode_outside"))
        and ((name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)) or _RANDOM_ATTRIBUTE.search(name))
    ]
    for module, name in active:
        if "jitter" in name:
            # Phi 3.5 MoE reads it in evaluation, too
            keep_in_evaluation(module)
        else:
            setattr(module, name, 0.0)
    return len(active)


def keeps_no_checkpoints(module: nn.Module) -> bool:
    """Whether a module does not ask for its mode inside its forward to know whether to keep activations."""
    if isinstance(module, GradientCheckpointingLayer) or not hasattr(module, "gradient_checkpointing"):
        return True
    # Others have the attribute, and leave checkpoints to their layers.
    return "gradient_checkpointing" not in inspect.getsource(type(module).forward)


def keep_in_evaluation(module: nn.Module) -> None:
    """Have a module compute as in evaluation, whatever mode the model is in; those inside it are not concerned."""
    if hasattr(module, "mode_outside"):
        return
    _begin_evaluation(module, ())
    _end_evaluation(module, (), None)
    module.register_forward_pre_hook(_begin_evaluation)
    module.register_forward_hook(_end_evaluation, always_call=True)


def _begin_evaluation(module: Any, args: object) -> None:
    # gradient checkpointing looks at the mode before a layer runs
    module.mode_outside, module.training = module.training, False


def _end_evaluation(module: Any, args: object, output: object) -> None:
    module.training = module.mode_outside
