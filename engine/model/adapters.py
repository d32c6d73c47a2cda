"""Low-rank adapters on a causal language model: fresh ones, trained ones that go on, and their frozen copies."""

from __future__ import annotations

import re
import warnings
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn

from engine.config.fields import nearest
from engine.config.schema import LoraConfig
from engine.errors import UserError
from engine.model.layers import text_model
from engine.model.sources import check_folder, first_line

if TYPE_CHECKING:
    from engine.model.policy import Policy

ADAPTER_FILE = "adapter_model.safetensors"
TRAINED = "default"
"""peft's name of the adapter that is trained."""
FROZEN = "reference"
"""Name of the frozen copy of a trained adapter that goes on; it is the reference."""
_LOADED = "loaded"


def import_peft(key: str) -> Any:
    """The peft package.

    Raises:
        UserError: it is not installed; names the ``key`` that needs it.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{key} needs peft: pip install dpo-kernels[peft]") from error
    return peft


def add_lora(causal_lm: nn.Module, lora: LoraConfig) -> nn.Module:
    """Wrap a model with fresh adapters in float32; the base is frozen. Of composites the text model is adapted.

    Raises:
        UserError: target modules that the model does not have, or that cannot be adapted.
    """
    peft = import_peft("model.lora")
    targets = lora.target_modules
    if isinstance(targets, tuple):
        _check_names(causal_lm, targets)
    try:
        adapted = peft.get_peft_model(
            causal_lm,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(targets) if isinstance(targets, tuple) else targets,
                exclude_modules=_outside_text(causal_lm),
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
            ),
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={lora.target_modules}: {first_line(error)}") from error
    return _in_float32(adapted)


def _outside_text(causal_lm: nn.Module) -> str | None:
    """A pattern of the modules that no text reaches, such as a vision tower; None where there are none."""
    text = text_model(causal_lm)
    if text is causal_lm:
        return None
    prefix = next(name for name, module in causal_lm.named_modules() if module is text)
    return rf"(?!{re.escape(prefix)}\.).*"


def _check_names(causal_lm: nn.Module, targets: tuple[str, ...]) -> None:
    """Raise a ``UserError`` for a name that no layer ends with; peft would adapt the others and say nothing."""
    layers = dict(text_model(causal_lm).named_modules())
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]
    if not missing:
        return
    known = {name.rpartition(".")[2] for name, module in layers.items() if not any(module.children())}
    close = nearest(missing[0], sorted(known))
    raise UserError(
        f"model.lora.target_modules: no layer of {type(causal_lm).__name__} is called {', '.join(missing)}"
        + (f"; did you mean {close}?" if close else f"; its layers are called {', '.join(sorted(known - {''}))}")
    )


def continue_adapter(causal_lm: nn.Module, source: str, *, empty: bool = False) -> nn.Module:
    """Wrap a model with a trained adapter, which is trained further, and its frozen copy, which is the reference.

    Both are float32. The copy has no dropout, so that it is the same function in every mode.

    Args:
        source: a folder or a Hub id.
        empty: build the adapters from their config and read no weights: for shapes alone.

    Raises:
        UserError: not a low-rank adapter, or one of another model.
    """
    peft = import_peft("model.adapter_name_or_path")
    what = f"model.adapter_name_or_path={source}"
    check_folder(source, "model.adapter_name_or_path=")
    name = type(causal_lm).__name__
    try:
        _check_kind(peft, source)
        with warnings.catch_warnings():
            # peft loads what fits and warns of the rest, which is an error below
            warnings.simplefilter("ignore")
            read = _from_config if empty else peft.PeftModel.from_pretrained
            model = read(causal_lm, source, TRAINED, is_trainable=True)
        if Path(source).is_dir():
            _check_layers(peft, model, Path(source), TRAINED)
        _refuse_saved_modules(model, what)
        config = deepcopy(model.peft_config[TRAINED])
        config.lora_dropout, config.inference_mode = 0.0, True
        model.add_adapter(FROZEN, config)
        if not empty:
            weights = peft.get_peft_model_state_dict(model, adapter_name=TRAINED)
            peft.set_peft_model_state_dict(model, weights, adapter_name=FROZEN)
    except (RuntimeError, ValueError, TypeError, OSError, KeyError) as error:
        raise UserError(f"{what} does not fit {name}: {first_line(error)}") from error
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED in parameter_name.split("."))
    return _in_float32(model)


def _from_config(causal_lm: nn.Module, source: str, adapter: str, *, is_trainable: bool) -> Any:
    """As ``PeftModel.from_pretrained``, with the initial weights of the adapter."""
    import peft

    config = peft.PeftConfig.from_pretrained(source)
    config.inference_mode = not is_trainable
    return peft.PeftModelForCausalLM(causal_lm, config, adapter)


def load_adapter(policy: Policy, path: Path) -> None:
    """Put the adapter in folder ``path`` on ``policy``, with the rank and scale that it was trained with.

    An adapter that the policy has already stays where it is, switched off.

    Raises:
        UserError: not a low-rank adapter, or one of another model.
    """
    peft = import_peft("an adapter")
    model: Any = policy.model
    name = type(policy.causal_lm).__name__
    try:
        _check_kind(peft, str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if policy.has_adapter:
                model.load_adapter(str(path), _LOADED)
                model.set_adapter(_LOADED)
            else:
                policy.model = model = peft.PeftModel.from_pretrained(model, str(path), _LOADED)
        _check_layers(peft, model, path, _LOADED)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"the adapter {path} does not fit {name}: {first_line(error)}") from error


def _check_kind(peft: Any, source: str) -> None:
    config = peft.PeftConfig.from_pretrained(source)
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"{source} is an adapter of kind {config.peft_type}: only LORA is supported")


def _check_layers(peft: Any, model: Any, path: Path, adapter: str) -> None:
    with safe_open(path / ADAPTER_FILE, "pt") as file:
        stored = set(file.keys())
    if stored != set(peft.get_peft_model_state_dict(model, adapter_name=adapter)):
        raise ValueError("it belongs to other layers")


def _refuse_saved_modules(model: Any, what: str) -> None:
    saved = model.peft_config[TRAINED].modules_to_save
    if saved:
        raise UserError(
            f"{what} has trained copies of {', '.join(saved)} (modules_to_save), which are not supported: merge it "
            "into its base with peft's merge_and_unload and train on that"
        )


def _in_float32(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if re.search(r"\.lora_", name):
            parameter.data = parameter.data.float()
    return model
