"""How a model computes a pack: as it is, with some modules in rows, or all of it in rows.

From the fastest to the one that asks least of a model. Which one a model gets is measured (``layout_choice.py``); each
gives the log-probs of one response at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..config.schema import PackingConfig
from .mixers import class_name, put_in_rows
from .policy import Layout, Policy

_WORDS = {
    "shared": "the whole model on packs",
    "mixers": "packs, mixers in rows",
    "rows": "rows: padded, the whole model",
    "single": "one row at a time, the whole model",
}


def use_layout(policy: Policy, layout: Layout) -> None:
    """Have a policy compute packs in this way from now on."""
    model: Any = policy.causal_lm
    put_in_rows(model, layout.mixers)
    policy.layout = layout
    if policy.obstacle is None:
        _set_attention(model, _implementation(policy))


def _set_attention(model: Any, name: str) -> None:
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    else:
        # its masks are made by this name all the same
        model.config._attn_implementation = name


def _implementation(policy: Policy) -> str:
    """The name under which transformers knows the attention of a policy's layout."""
    model: Any = policy.causal_lm
    return model.get_correct_attn_implementation(None) if policy.layout.in_rows else policy.backend.implementation


@contextmanager
def eager_attention(policy: Policy) -> Iterator[None]:
    """The model's own eager attention for a while; of a model whose attention is not exchanged, its own as it is."""
    with _attention(policy, "eager"):
        yield


@contextmanager
def own_attention(policy: Policy) -> Iterator[None]:
    """The attention that transformers takes for the model by itself, for a while."""
    model: Any = policy.causal_lm
    with _attention(policy, model.get_correct_attn_implementation(None)):
        yield


@contextmanager
def _attention(policy: Policy, name: str) -> Iterator[None]:
    if policy.obstacle is not None:
        yield
        return
    model: Any = policy.causal_lm
    _set_attention(model, name)
    try:
        yield
    finally:
        _set_attention(model, _implementation(policy))


def settled(packing: PackingConfig, policy: Policy) -> PackingConfig:
    """``packing`` with what the layout of a policy decides: whole models in rows have their prompts repeated."""
    if policy.layout.in_rows:
        return replace(packing, layout="rows", share_prompts=False)
    return replace(packing, layout="shared")


def attention_name(policy: Policy) -> str:
    """What computes attention: a backend of ours, or ``own`` and the name of the model's own implementation."""
    if not policy.layout.in_rows:
        return policy.backend.name
    return f"own {policy.config._attn_implementation}"


def attention_words(policy: Policy) -> str:
    """What computes attention, and why."""
    reason = "rows run in the model's own" if policy.layout.in_rows else policy.backend.reason
    return f"{attention_name(policy)} ({reason})"


def describe_layout(policy: Policy) -> str:
    """The layout in words, what it is for and how many modules it concerns."""
    layout = policy.layout
    text = _WORDS[layout.kind]
    if layout.mixers:
        text += f": {mixer_words(policy.causal_lm, layout)}"
    reasons = [layout.reason] if layout.reason else []
    if layout.padded_for:
        reasons.append(f"rows are padded, since end to end {layout.padded_for}")
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def mixer_words(model: nn.Module, layout: Layout) -> str:
    """Which modules get rows, and whether these are laid end to end."""
    return count_mixers(model, layout.mixers) + (", end to end" if layout.joined else "")


def count_mixers(model: nn.Module, names: tuple[str, ...]) -> str:
    """How many modules there are of each class, such as ``Qwen3_5GatedDeltaNet x 18``."""
    counts = Counter(class_name(module) for module in model.modules())
    return ", ".join(f"{name} x {counts[name]}" for name in names)
