"""Low-rank adapters on a causal language model: fresh ones, trained ones that go on, and their frozen copies."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.fields import nearest
from ..config.schema import LoraConfig
from ..errors import UserError, out_of_memory
from .adapter_forms import READ_ERRORS, check_form, stored_names
from .adapter_products import join_products
from .layers import text_model
from .sources import check_folder, first_line

if TYPE_CHECKING:
    from .policy import Policy

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
    if isinstance(targets, str) and targets.isidentifier():
        # To peft it would be a pattern of whole paths, which no layer matches.
        targets = (targets,)
    if isinstance(targets, tuple):
        _check_names(causal_lm, targets, "target_modules")
    _check_names(causal_lm, lora.modules_to_save, "modules_to_save")
    own: dict[str, Any] = {}
    if lora.target_parameters:
        _check_parameters(peft, causal_lm, lora.target_parameters)
        own["target_parameters"] = list(lora.target_parameters)
    special = _more_than_products(causal_lm)
    try:
        adapted = peft.get_peft_model(
            causal_lm,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(targets) if isinstance(targets, tuple) else targets,
                exclude_modules=_not_adapted(causal_lm, special if targets == "all-linear" else []),
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
                modules_to_save=list(lora.modules_to_save) or None,
                **own,
            ),
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={lora.target_modules}: {first_line(error)}") from error
    if wrong := [name for name in adapted.base_model.targeted_module_names if name in special]:
        raise UserError(
            f"model.lora.target_modules: {wrong[0]} gives more than the product of a linear layer: leave it out"
        )
    head = adapted.get_base_model().get_output_embeddings()
    if lora.use_dora and lora.dropout and hasattr(head, "base_layer"):
        raise UserError(
            "model.lora.use_dora with dropout on the output layer is no product with one weight: set "
            "model.lora.dropout to 0, or leave lm_head out of model.lora.target_modules"
        )
    return _in_float32(adapted)


def _not_adapted(causal_lm: nn.Module, special: list[str]) -> str | None:
    """A pattern of ``special`` and of the modules that no text reaches, such as a vision tower; None for nothing."""
    patterns = [re.escape(name) for name in special]
    text = text_model(causal_lm)
    if text is not causal_lm:
        kept = rf"{re.escape(_name_of(causal_lm, text))}\."
        if (head := causal_lm.get_output_embeddings()) is not None:  # type: ignore[operator]
            kept += rf"|{re.escape(_name_of(causal_lm, head))}$"
        patterns.append(rf"(?!{kept}).*")
    return "|".join(patterns) or None


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _more_than_products(causal_lm: nn.Module) -> list[str]:
    """Names of linear layers of the model's own kind that give something else: a router may return a pair."""
    own = {type(module).__module__ for module in causal_lm.modules() if isinstance(module, PreTrainedModel)}
    return [
        name
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear)
        and next(kind.__module__ for kind in type(module).__mro__ if "forward" in vars(kind)) in own
        and not _gives_a_row(module)
    ]


def _gives_a_row(layer: nn.Linear) -> bool:
    """Whether a layer turns a row into a row, as a linear layer does."""
    with torch.no_grad():
        given = layer(layer.weight.new_zeros(1, layer.in_features))
    return isinstance(given, torch.Tensor) and given.shape == (1, layer.out_features)


def _check_names(causal_lm: nn.Module, targets: tuple[str, ...], field: str) -> None:
    """Raise a ``UserError`` for a name that no layer ends with; peft would adapt the others and say nothing."""
    layers = dict(text_model(causal_lm).named_modules())
    if (head := causal_lm.get_output_embeddings()) is not None:  # type: ignore[operator]
        layers[_name_of(causal_lm, head)] = head
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]
    if not missing:
        return
    known = {name.rpartition(".")[2] for name, module in layers.items() if not any(module.children())}
    close = nearest(missing[0], sorted(known))
    raise UserError(
        f"model.lora.{field}: no layer of {type(causal_lm).__name__} is called {', '.join(missing)}"
        + (f"; did you mean {close}?" if close else f"; its layers are called {', '.join(sorted(known - {''}))}")
    )


def _check_parameters(peft: Any, causal_lm: nn.Module, targets: tuple[str, ...]) -> None:
    """Raise a ``UserError`` for a name that no parameter ends with, or that has a layer of its own to adapt."""
    option = "model.lora.target_parameters"
    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        raise UserError(f"{option} needs a newer peft than {peft.__version__}: pip install -U 'peft>=0.18'")
    found = {name: p for name, p in text_model(causal_lm).named_parameters() if p.ndim in (2, 3)}
    ends = {t: [name for name in found if name == t or name.endswith(f".{t}")] for t in targets}
    if missing := [t for t, names in ends.items() if not names]:
        stacked = sorted({".".join(name.rsplit(".", 3)[-3:]) for name, p in found.items() if p.ndim == 3})
        close = nearest(missing[0], stacked)
        known = f"its stacked experts are {', '.join(stacked)}" if stacked else "it has no stacked experts"
        raise UserError(
            f"{option}: no parameter of {type(causal_lm).__name__} is called {', '.join(missing)}; "
            + (f"did you mean {close}?" if close else known)
        )
    layers = {id(m.weight): name for name, m in causal_lm.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for names in ends.values():
        for name in names:
            if (layer := layers.get(id(found[name]))) is not None:
                raise UserError(f"{option}: {name} is the weight of a layer: name {layer} in model.lora.target_modules")


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
        check_form(peft, source, what)
        read = _from_config if empty else peft.PeftModel.from_pretrained
        with quiet_loading():
            model = read(causal_lm, source, TRAINED, is_trainable=True)
        _in_float32(model)
        _check_layers(peft, model, source, TRAINED)
        _read_copies(peft, model, source, TRAINED, filled=not empty)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        _add_frozen_copy(peft, model, filled=not empty)
    except ImportError as error:
        raise UserError(f"{what}: {first_line(error)}") from error
    except READ_ERRORS as error:
        if out_of_memory(error) is not None:
            raise
        raise UserError(f"{what} does not fit {name}: {first_line(error)}") from error
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
    return model


def _add_frozen_copy(peft: Any, model: Any, *, filled: bool) -> None:
    config = deepcopy(model.peft_config[TRAINED])
    config.lora_dropout, config.inference_mode = 0.0, True
    # A start such as PiSSA's would take its part out of the base a second time.
    config.init_lora_weights = False
    try:
        model.add_adapter(FROZEN, config)
    except ValueError as error:
        if not getattr(config, "target_parameters", None):
            raise
        raise UserError(
            f"model.adapter_name_or_path: peft {peft.__version__} holds one adapter on single parameters, and the "
            "frozen copy is a second: pip install -U peft, or merge the adapter into its base with `dpo merge`"
        ) from error
    _in_float32(model)
    if filled:
        weights = peft.get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
        peft.set_peft_model_state_dict(model, weights, adapter_name=FROZEN)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """While peft loads an adapter: it warns of what does not fit, which is an error here, and draws random numbers.

    They are the same each time, since the starts of some adapters depend on them (PiSSA by ``svd_lowrank``).
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _from_config(causal_lm: nn.Module, source: str, adapter: str, *, is_trainable: bool) -> Any:
    """As ``PeftModel.from_pretrained``, with the initial weights of the adapter."""
    import peft

    config = peft.PeftConfig.from_pretrained(source)
    config.inference_mode = not is_trainable
    # A start that computes with the base weights needs their values.
    config.init_lora_weights = True
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
        check_form(peft, str(path), f"the adapter {path}")
        with quiet_loading():
            if policy.has_adapter:
                model.load_adapter(str(path), _LOADED)
                model.set_adapter(_LOADED)
            else:
                policy.model = model = peft.PeftModel.from_pretrained(model, str(path), _LOADED)
        _in_float32(model)
        _check_layers(peft, model, str(path), _LOADED)
        _read_copies(peft, model, str(path), _LOADED, filled=policy.device.type != "meta")
    except ImportError as error:
        raise UserError(f"the adapter {path}: {first_line(error)}") from error
    except READ_ERRORS as error:
        if out_of_memory(error) is not None:
            raise
        raise UserError(f"the adapter {path} does not fit {name}: {first_line(error)}") from error


def _check_layers(peft: Any, model: Any, source: str, adapter: str) -> None:
    stored = stored_names(source)
    if stored is None:
        return
    found = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    # peft stores the base of adapted embeddings, too
    if any(".base_layer." not in name for name in stored ^ set(found)):
        raise ValueError("it belongs to other layers")


def _read_copies(peft: Any, model: Any, source: str, adapter: str, *, filled: bool) -> None:
    """Read trained copies of modules again, which peft has rounded to the dtype of the base."""
    if filled and model.peft_config[adapter].modules_to_save:
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(source, device="cpu"), adapter_name=adapter)


def _in_float32(model: nn.Module) -> nn.Module:
    """Hold adapters and trained copies of modules in float32; what copies compute has the dtype of their originals.

    Otherwise the residual stream of the policy would be wider than that of its reference.
    """
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict):
            continue
        dtype = next(module.original_module.parameters()).dtype  # type: ignore[union-attr]
        for copy in copies.values():
            if next(copy.parameters()).dtype != dtype or dtype == torch.float32:
                continue
            copy.float()
            copy.register_forward_hook(_cast_to(dtype))
    for name, parameter in model.named_parameters():
        if re.search(r"\.lora_", name):
            parameter.data = parameter.data.float()
    join_products(model)
    return model


def hold_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the adapters and trained copies of modules, which are float32, in ``dtype``."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and (".lora_" in name or ".modules_to_save." in name):
            parameter.data = parameter.data.to(dtype)


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda module, given, output: output.to(dtype) if isinstance(output, torch.Tensor) else output
