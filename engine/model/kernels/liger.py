"""Liger-Kernel's layers in a loaded model: norms, rotary embedding and gated activations, never its loss.

Liger exchanges functions and classes of transformers' modules, and methods of the model's own modules. What it changes
is taken down, and of that methods and functions are kept: models that are loaded later get transformers' own classes.
Its experts are left out, since they compute in the dtype of the weights and tokens are counted in ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..experts import is_experts
from ..policy import Policy
from .exchange import ABSENT, Change, Exchange

DEVICES = ("cuda",)
_ROTARY = "liger_rotary_pos_emb"
_OFF = ("cross_entropy", "fused_linear_cross_entropy", "layer_norm")
"""Its losses, and what it would exchange in torch itself."""

_functions: dict[tuple[str, str], Any] = {}
"""Functions of transformers' modules as they were, by module and name: these are exchanged for the whole process."""


def liger_changes(policy: Policy) -> list[Change]:
    """What Liger's layers change in a policy; nothing is changed yet.

    Raises:
        ValueError: there are none for this model, on this device, or in this environment.
    """
    if policy.device.type not in DEVICES:
        raise ValueError(f"a CUDA device is needed, and this is {policy.device.type}")
    return liger_layers(policy)


def liger_layers(policy: Policy) -> list[Change]:
    """The same on any device, for shapes alone.

    Raises:
        ValueError: there are none for this model, or in this environment.
    """
    if lack := liger_lack():
        raise ValueError(lack)
    from liger_kernel.transformers import monkey_patch

    model: Any = policy.causal_lm
    family = model.config.model_type
    if family not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"liger-kernel {metadata.version('liger-kernel')} has no layers for {family}")
    experts = [id(vars(module)) for module in model.modules() if is_experts(module)]
    before = _snapshot(model)
    monkey_patch._apply_liger_kernel_to_instance(model, **dict.fromkeys(_OFF, False))
    found = list(_changes(before))
    Exchange(found).off()
    changes = [change for change in found if id(change.namespace) not in experts and not isinstance(change.fused, type)]
    if not any(change.name == "forward" for change in changes):
        raise ValueError(f"liger-kernel exchanges no layer of {type(model).__name__}")
    return changes


def liger_lack() -> str:
    """Why there are no layers of Liger's for any model; empty where there are."""
    return "" if find_spec("liger_kernel") else "liger-kernel is not installed (pip install dpo-kernels[liger])"


def _snapshot(model: torch.nn.Module) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Names, namespaces and their contents: of what Liger may change, with functions as transformers has them."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("transformers.models.")}
    for (module, name), function in _functions.items():
        setattr(modules[module], name, function)
    spaces = [(name, vars(module)) for name, module in modules.items() if module is not None]
    spaces += [("", vars(module)) for module in model.modules()]
    return [(name, space, dict(space)) for name, space in spaces]


def _changes(before: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> Iterator[Change]:
    for module, space, old in before:
        for name, new in list(space.items()):
            plain = old.get(name, ABSENT)
            if new is plain:
                continue
            fused = new
            if module and isinstance(plain, FunctionType):
                _functions.setdefault((module, name), plain)
                fused = _rotary(new) if new.__name__.startswith(_ROTARY) else new
            yield Change(space, name, plain, fused)


@cache
def _rotary(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """Liger's rotary embedding, which writes over its inputs, for checkpointing that keeps what products gave."""

    def apply(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if _get_current_dispatch_mode() is not None:
            # it would rotate the kept products once more when it is computed again
            query, key = query.clone(), key.clone()
        result: tuple[torch.Tensor, torch.Tensor] = rotate(query, key, *args, **kwargs)
        return result

    return apply
