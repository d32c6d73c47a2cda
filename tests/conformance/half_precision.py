"""A family in bfloat16 on packs against its own eager forward, both measured from the same model in float32."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.config.schema import LoraConfig
from engine.data.groups import PreferenceGroup
from engine.model.adapters import add_lora, text_model
from engine.model.attention import Backend, register_backends
from engine.model.load import disable_dropout
from engine.model.policy import Policy
from engine.packing import build_batch
from tests.conformance.trial import sample_groups

BF16 = torch.bfloat16
MEAN_FACTOR, LARGEST_FACTOR = 2.0, 4.0
"""How many times the error of the model's own forward in bfloat16, eager or fused, packs may have."""
FLOOR = 0.02
"""Error that is rounding whatever that forward does."""
SMALL = 0.01
"""Norm of a small gradient, as a share of the largest one."""


class Outcome(NamedTuple):
    """Log-probs of all responses, and the gradients of a weighted sum of them, in float32."""

    logps_N: torch.Tensor
    grads: dict[str, torch.Tensor]


def adapted(model: nn.Module, *, lora: bool) -> nn.Module:
    """The model as the engine trains it: all float32, or a bfloat16 base with float32 adapters away from zero."""
    disable_dropout(model)
    if not lora:
        return model
    model.to(BF16)
    # keeps what transformers keeps in float32 when it loads a model in bfloat16
    for name, parameter in model.named_parameters():
        if any(word in name for word in getattr(model, "_keep_in_fp32_modules_strict", None) or ()):
            parameter.data = parameter.data.float()
    # layers that are more than linear, such as Llama 4's routers, do not take adapters
    inside, head = text_model(model).named_modules(), model.get_output_embeddings()
    linear = [name for name, module in inside if type(module) in (nn.Linear, Conv1D) and module is not head]
    wrapped = add_lora(model, LoraConfig(r=4, target_modules=tuple(linear)))
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    return wrapped


def own_outcome(model: nn.Module, dtype: torch.dtype, groups: list[PreferenceGroup], attention: str) -> Outcome:
    """One response at a time, by one of transformers' own ways to compute attention, in float32 or under autocast."""
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    causal_lm.set_attn_implementation(attention)
    pieces = []
    for group in groups:
        for response in group.response_ids:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]).astype(np.int64))
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = causal_lm(input_ids=ids[None], use_cache=False).logits[0]
            rows = logits[len(group.prompt_ids) - 1 : -1].float().log_softmax(-1)
            pieces.append(rows.gather(1, ids[len(group.prompt_ids) :, None])[:, 0])
    return _outcome(model, torch.cat(pieces))


def packed(model: nn.Module, backend: Backend, groups: list[PreferenceGroup], *, share_prompts: bool) -> Outcome:
    """The same by the engine, in bfloat16."""
    register_backends()
    policy = Policy(model, backend=backend, compute_dtype=BF16)
    policy.causal_lm.set_attn_implementation(backend.implementation)
    return _outcome(model, policy.logps(build_batch(groups, share_prompts=share_prompts)))


def _outcome(model: nn.Module, logps_N: torch.Tensor) -> Outcome:
    model.zero_grad()
    weights = torch.randn(len(logps_N), generator=torch.Generator().manual_seed(1))
    (weights * logps_N).sum().backward()
    return Outcome(
        logps_N.detach().float(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    )


def faults(exact: Outcome, own: list[Outcome], ours: Outcome) -> list[str]:
    """Where ``ours`` is further from ``exact`` than the furthest of ``own`` allows.

    Twice its error on the whole, in the square mean; four times its largest, since where rounding strikes is chance.
    """
    if ours.grads.keys() != exact.grads.keys():
        return [f"gradients of other parameters: {sorted(ours.grads.keys() ^ exact.grads.keys())}"]
    found = []
    bounds = {"on the whole": MEAN_FACTOR, "at worst": LARGEST_FACTOR}
    for mine, *theirs in zip(_errors(ours, exact), *(_errors(outcome, exact) for outcome in own), strict=True):
        for where, factor in bounds.items():
            allowed = max(factor * max(errors[where] for errors in theirs), FLOOR)
            if not mine[where] <= allowed:
                found.append(f"{mine['what']} {where}: {mine[where]:.3g}, allowed {allowed:.3g}")
    return found


def _errors(outcome: Outcome, exact: Outcome) -> tuple[dict, dict]:
    """Errors of log-probs as a share of the largest one, and of gradients as a share of norms."""
    logps = (outcome.logps_N - exact.logps_N).abs() / exact.logps_N.abs().max()
    errors = {name: float((outcome.grads[name] - want).norm()) for name, want in exact.grads.items()}
    norms = {name: float(want.norm()) for name, want in exact.grads.items()}
    # a gradient near zero has rounding of its neighbours' size
    smallest = SMALL * max(norms.values())
    return (
        {"what": "log-probs", "on the whole": float(logps.square().mean().sqrt()), "at worst": float(logps.max())},
        {
            "what": "gradients",
            "on the whole": math.hypot(*errors.values()) / math.hypot(*norms.values()),
            "at worst": max(errors[name] / max(norm, smallest) for name, norm in norms.items()),
        },
    )


def try_half_precision(model: nn.Module, backends: list[Backend], *, lora: bool) -> dict[str, list[str]]:
    """What each backend gets wrong on shared and on repeated prompts, by name; empty lists where nothing."""
    groups = sample_groups()
    model = adapted(model, lora=lora)
    own = [own_outcome(model, BF16, groups, "eager")]
    if getattr(model, "_supports_sdpa", False):
        own.append(own_outcome(model, BF16, groups, "sdpa"))
    exact = own_outcome(deepcopy(model).float(), torch.float32, groups, "eager")
    result = {}
    for backend in backends:
        found: list[str] = []
        for share_prompts in (True, False):
            ours = packed(model, backend, groups, share_prompts=share_prompts)
            found += [f"share_prompts={share_prompts}: {fault}" for fault in faults(exact, own, ours)]
        result[backend.name] = found
    return result
