"""Where a model that is wrong on packs goes wrong, in words for its error message, and what to give rows instead."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..packing.layout import PackedBatch
from .layouts import eager_attention
from .mixers import class_name
from .policy import Policy

_RELATIVE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference of an activation that is rounding, relative to the largest activation."""


class _Call(NamedTuple):
    """The first run of a module: its first input and its first output that have a row per token, or None."""

    type_name: str
    before: torch.Tensor | None
    after: torch.Tensor | None


class Place(NamedTuple):
    """Where a model goes wrong."""

    words: str
    """Such as ``model.layers.0.mixer (MambaMixer), which depends on the rest of a pack``."""
    mixer: str | None
    """The class of that module, where it may be right in rows."""


def innermost_module(error: BaseException) -> nn.Module | None:
    """The module whose method raised; None where it was none, as in most backward passes."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((owner for owner in reversed(frames) if isinstance(owner, nn.Module)), None)


def first_difference(policy: Policy, batch: PackedBatch, start: int) -> Place:
    """The first module that turns equal inputs into other outputs on a pack than in the model's own eager forward.

    Args:
        batch: a pack whose rows from ``start`` on are one sequence.
    """
    model = policy.causal_lm
    packed = _trace(model, batch.num_tokens, lambda: policy.logps(batch))
    ids = batch.input_ids_T[None, start:]
    with eager_attention(policy):
        plain = _trace(model, ids.shape[1], lambda: policy.plain_logits(ids))
    tolerance = _RELATIVE[policy.compute_dtype]
    # Small activations are first taken for rounding; where nothing else is found they are measured by themselves, as of
    # a model fresh from its initialisation.
    for least in (1.0, 0.0):
        for name, pack in packed.items():
            alone = plain.get(name)
            if alone is None or pack.after is None or alone.after is None:
                continue
            same_input = _equal(pack.before, alone.before, start, tolerance, least)
            if same_input and not _equal(pack.after, alone.after, start, tolerance, least):
                reads = pack.type_name in batch.plan.readers
                reason = (
                    "whose attention does more than packs support" if reads else "which depends on the rest of a pack"
                )
                return Place(f"{name} ({pack.type_name}), {reason}", None if reads else pack.type_name)
    words = "the output layers, which do more than a linear layer with the scale and cap that the config names"
    return Place(words, None)


def _trace(model: nn.Module, num_tokens: int, run: Callable[[], Any]) -> dict[str, _Call]:
    """The modules that ran, by name, in order of completion."""
    calls: dict[str, _Call] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        outputs = list(output.values()) if isinstance(output, dict) else output
        after = _per_token(outputs if isinstance(outputs, (tuple, list)) else [outputs], num_tokens)
        before = _per_token([*args, *kwargs.values()], num_tokens)
        calls.setdefault(names[module], _Call(class_name(module), before, after))

    names = {module: name for name, module in model.named_modules() if name}
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _per_token(values: Any, num_tokens: int) -> torch.Tensor | None:
    """The first tensor whose first or second dimension counts tokens, as [tokens, ...]."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            if value.shape[0] == 1 and value.shape[1] == num_tokens:
                return value[0].detach()
            if value.shape[0] == num_tokens:
                return value.detach()
    return None


def _equal(packed: torch.Tensor | None, alone: torch.Tensor | None, start: int, tolerance: float, least: float) -> bool:
    """Within rounding, which is relative to the largest activation, or to ``least`` where all are smaller."""
    if packed is None or alone is None:
        return packed is alone
    packed = packed[start:]
    if packed.shape != alone.shape or not alone.is_floating_point():
        return packed.shape == alone.shape and torch.equal(packed, alone)
    return bool((packed - alone).abs().max() <= tolerance * max(least, alone.abs().max().item()))
