"""A module computed in two ways on the same inputs: what each gives, gradients of inputs and weights included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def results(
    module: nn.Module, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a way to compute ``module`` gives; and its outputs, and the gradients of inputs and weights, by name.

    Args:
        compute: called with the arguments, in which the numbers are leaves.
        args, kwargs: arguments of the module's forward.
    """
    leaves, form = tree_flatten((args, kwargs))
    with torch.enable_grad():
        inputs = [leaf.detach().clone().requires_grad_() if is_number(leaf) else leaf for leaf in leaves]
        new_args, new_kwargs = tree_unflatten(inputs, form)
        output = compute(*new_args, **new_kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if is_number(leaf) and leaf.requires_grad]
        names = [(f"gradient of input {i}", leaf) for i, leaf in enumerate(inputs) if is_number(leaf)]
        weights = module.named_parameters()
        names += [(f"gradient of {name}", weight) for name, weight in weights if weight.requires_grad]
        upstream = [_upstream(leaf) for leaf in outputs]
        found = {f"output {i}": leaf.detach().float() for i, leaf in enumerate(outputs)}
        grads = torch.autograd.grad(outputs, [leaf for _, leaf in names], upstream, allow_unused=True)
    found |= {name: grad.float() for (name, _), grad in zip(names, grads, strict=True) if grad is not None}
    return output, found


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a tensor that can have a gradient."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _upstream(like: torch.Tensor) -> torch.Tensor:
    """Numbers that are the same whenever they are drawn."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like)
