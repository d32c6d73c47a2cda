"""Checks of what lies at the edges: numbers that are not finite or huge, sizes past 2^31, kernels compiled too often.

Legend: N rows, D features, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_checks import (
    IGNORED,
    Inputs,
    make_inputs,
    multiple,
    our_logps,
    plain_logps,
    plain_slope,
    with_gradients,
)
from benchmarks.gpu_table import Check, Context, SkippedError
from dpo_kernels import LOSS_TYPES, linear_dpo_loss, linear_logps
from dpo_kernels.head import Head
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_logps import empty_exps, score_rows
from dpo_kernels.linear_logps.stats import STATS

MOST_VARIANTS = 8
"""Compiled variants of a kernel over random batches: more would stall a run again and again."""


def limit_checks(context: Context) -> Iterator[Check]:
    device, tiny = context.device, context.dry_run
    for scale in (1e4, -1e4):
        yield Check(f"logits of {scale:g}", partial(_extreme_error, device, scale), 1e-3)
    yield Check("all rows ignored give exact zeros", partial(_ignored_sum, device), 0.0)
    for slope in (0.05, 3.0, 30.0):
        yield Check(f"float16, frozen head, slope {slope:g}", partial(_steep_error, device, slope, tiny), 2.0)
    for what in ("nan", "inf"):
        yield Check(f"{what} in one row stays there", partial(_poisoned_rows, device, float(what), tiny), 0.0)
    for loss_type in ("sigmoid", "hinge") if tiny else LOSS_TYPES:
        yield Check(f"NaN reaches the {loss_type} loss", partial(_hidden_nan, device, loss_type, tiny), 0.0)
    yield Check("variants over random batches", partial(_compiled_variants, context), float(MOST_VARIANTS), 150)


def size_checks(context: Context) -> Iterator[Check]:
    """Offsets past 2^31, where there is memory for them; a dry run goes the same ways with small numbers."""
    device, tiny = context.device, context.dry_run
    size = 300 if tiny else 2**31 + 2**20
    yield Check("exponentials past 2^31 elements", partial(_large_exps_error, context, size), 2.0)
    yield Check("weight past 2^31 elements", partial(_large_operand_error, context, size, "weight"), 1e-3)
    yield Check("hidden states past 2^31 elements", partial(_large_operand_error, context, size, "hidden"), 1e-3)
    shape = (37, 64, 300) if tiny else (131072 + 128, 64, 262144)
    yield Check("statistics past 2^31 bytes", partial(_large_stats_error, device, shape, context), 2e-3)


def _need_memory(context: Context, gib: float) -> None:
    if context.dry_run:
        return
    free = torch.cuda.mem_get_info(context.device)[0] / 2**30
    if free < gib:
        raise SkippedError(f"needs {gib:.0f} GiB of device memory, {free:.0f} are free")


def _extreme_error(device, scale: float) -> float:
    """Largest logit ``scale`` on every row (or all logits near it, when negative); gradients must be finite, too."""
    N, D, V = 5, 64, 130
    inputs = make_inputs(device, torch.bfloat16, (N, D, V), bias=False)
    hidden = torch.zeros_like(inputs.hidden)
    weight = inputs.weight.clone()
    hidden[:, 0], weight[:, 0] = abs(scale) ** 0.5, scale / abs(scale) ** 0.5
    if scale > 0:
        weight[1::2, 0] *= 0.5
    inputs = inputs._replace(hidden=hidden, weight=weight)
    upstream = torch.ones(N, device=device)
    ours = with_gradients(our_logps, inputs, upstream, trainable=True)
    exact = with_gradients(plain_logps, inputs.raised(), upstream, trainable=True)
    if not all(t.isfinite().all() for t in ours):
        return float("inf")
    return ((ours[0] - exact[0]).abs() / exact[0].abs().clamp(min=1)).max().item()


def _ignored_sum(device) -> float:
    inputs = make_inputs(device, torch.bfloat16, (37, 64, 130), bias=True)
    inputs = inputs._replace(labels=torch.full_like(inputs.labels, IGNORED))
    found = with_gradients(our_logps, inputs, torch.ones(37, device=device), trainable=True)
    return sum(t.abs().sum().item() for t in found)


def _steep_error(device, slope: float, tiny: bool) -> float:
    """A frozen float16 head whose largest logits come late in the vocabulary: exponentials times the slope must fit."""
    N, D, V = (4, 16, 600) if tiny else (656, 256, 128256)
    inputs = make_inputs(device, torch.float16, (N, D, V), bias=False)
    weight = inputs.weight * torch.linspace(0.2, 1.0, V, device=device)[:, None].half()
    inputs = inputs._replace(weight=weight, hidden=inputs.hidden / max(1.0, slope))
    upstream = torch.ones(N, device=device)
    options = {"logit_scale": slope}
    ours = with_gradients(our_logps, inputs, upstream, trainable=False, **options)
    plain, exact = (
        with_gradients(plain_logps, i, upstream, trainable=False, **options) for i in (inputs, inputs.raised())
    )
    return multiple(ours[1], plain[1], exact[1])


def _poisoned_rows(device, value: float, tiny: bool) -> float:
    """Hidden states of rows 1 and 3 are not finite, and row 3 is ignored: elements that are wrong for that.

    Row 1 is NaN in all but ``is_top1``, which is False; row 3 is exactly 0; every other row is finite.
    """
    shape = (6, 33, 300) if tiny else (300, 127, 1000)
    inputs = make_inputs(device, torch.bfloat16, shape, bias=True)
    hidden = inputs.hidden.clone()
    hidden[1] = hidden[3] = value
    wrong = 0
    for trainable in (True, False):
        leaf, weight = hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_(trainable)
        out = linear_logps(leaf, weight, inputs.labels, bias=inputs.bias, stats=STATS, impl="triton")
        (dX,) = torch.autograd.grad(out.logps.sum(), leaf)
        numbers = [out.logps[:, None], dX, *(out.stats[name][:, None] for name in STATS if name != "is_top1")]
        for values in numbers:
            wrong += int((~values[1].isnan()).sum()) + int((values[3] != 0).sum())
            wrong += int((~values[[0, 2, *range(4, shape[0])]].isfinite()).sum())
        wrong += int(out.stats["is_top1"][[1, 3]].sum())
    return float(wrong)


def _hidden_nan(device, loss_type: str, tiny: bool) -> float:
    """Losses that must be NaN and are not."""
    D, V = (33, 70) if tiny else (64, 1000)
    inputs = make_inputs(device, torch.bfloat16, (12, D, V), bias=False)
    hidden = inputs.hidden.clone()
    hidden[1] = float("nan")
    reference = torch.zeros(4, device=device)
    cu_responses = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    weight = inputs.weight.clone().requires_grad_()
    options: dict[str, Any] = {"loss_type": loss_type, "impl": "triton"}
    out = linear_dpo_loss(hidden.requires_grad_(), weight, inputs.labels, cu_responses, reference, **options)
    coupled = loss_type.startswith("aot")
    return float(not out.loss.isnan()) + float(not coupled and not out.pair_losses[0].isnan())


def _compiled_variants(context: Context) -> dict[str, Any]:
    """Train on random batches and count what Triton keeps compiled of each kernel."""
    device, tiny = context.device, context.dry_run
    draw = random.Random(0)
    D, V = (16, 200) if tiny else (256, 4096)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(torch.bfloat16).requires_grad_()
    before = kernel_variants()
    for _ in range(3 if tiny else 200):
        lengths = [draw.randint(1, 4 if tiny else 90) for _ in range(2 * draw.randint(1, 3 if tiny else 12))]
        cu_responses = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        hidden = torch.randn(sum(lengths), D, device=device).to(torch.bfloat16).requires_grad_()
        labels = torch.randint(V, (sum(lengths),), device=device)
        reference = torch.zeros(len(lengths), device=device)
        linear_dpo_loss(hidden, weight, labels, cu_responses, reference, impl="triton").loss.backward()
        linear_logps(hidden, weight, labels, impl="triton").sum().backward()
        linear_logps(hidden, weight.detach(), labels, impl="triton").sum().backward()
    found = {name: count - before.get(name, 0) for name, count in kernel_variants().items()}
    found = {name: count for name, count in found.items() if count}
    if not tiny and not found:
        return {"ok": False, "note": "no kernel was found in Triton's caches"}
    worst = max(found.values(), default=0)
    note = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
    return {"ok": worst <= MOST_VARIANTS, "value": float(worst), "bound": float(MOST_VARIANTS), "note": note}


def kernel_variants() -> dict[str, int]:
    """Compiled variants of every kernel of this package that this process holds; none in the interpreter."""
    import importlib
    import pkgutil

    import dpo_kernels.kernels

    found = {}
    for module in pkgutil.iter_modules(dpo_kernels.kernels.__path__, "dpo_kernels.kernels."):
        for name, kernel in vars(importlib.import_module(module.name)).items():
            caches = getattr(kernel, "device_caches", None)
            if caches is not None:
                found[name] = sum(len(cache[0]) for cache in caches.values())
    return found


def _large_exps_error(context: Context, size: int) -> float:
    """A buffer of ``size`` exponentials: the gradient of its last rows."""
    _need_memory(context, 24)
    device = context.device
    D, V = (33, 70) if context.dry_run else (64, 128256)
    N = -(-size // V)
    inputs = make_inputs(device, torch.bfloat16, (N, D, V), bias=False)
    upstream = torch.randn(N, device=device)
    exps = empty_exps(inputs.hidden, V)
    head = Head(inputs.weight)
    stats = score_rows(inputs.hidden, head, inputs.labels, ignore_index=IGNORED, exps=exps)
    found = softmax_grad_(exps, upstream, head, inputs.labels, stats, ignore_index=IGNORED)
    rows = slice(max(0, N - 64), N)
    last = Inputs(inputs.hidden[rows], inputs.weight, inputs.labels[rows], None)
    return multiple(found[rows], *(plain_slope(i, upstream[rows], {}) for i in (last, last.raised())))


def _large_operand_error(context: Context, size: int, operand: str) -> float:
    """Weight or hidden states of ``size`` elements: log-probs of its last rows."""
    _need_memory(context, 40)
    D = 33 if context.dry_run else 16896
    many, few = -(-size // D), 64
    shape = (few, D, many) if operand == "weight" else (many, D, few)
    inputs = make_inputs(context.device, torch.bfloat16, shape, bias=False)
    found = linear_logps(*inputs[:3], impl="triton")
    rows = slice(max(0, shape[0] - 64), shape[0])
    # fp32 in the comparison: a float64 copy of the weight would be 16 GiB, and the bound is far above fp32's error.
    last = Inputs(inputs.hidden[rows].float(), inputs.weight.float(), inputs.labels[rows], None)
    return (found[rows] - plain_logps(last)).abs().max().item()


def _large_stats_error(device, shape: tuple[int, int, int], context: Context) -> float:
    """Partials of statistics of so many rows and columns that their planes lie past 2^31 bytes: the last rows'."""
    _need_memory(context, 40)
    inputs = make_inputs(device, torch.bfloat16, shape, bias=False)
    found = linear_logps(*inputs[:3], stats=("entropy",), impl="triton").stats["entropy"]
    rows = slice(max(0, shape[0] - 64), shape[0])
    logp = (inputs.hidden[rows].double() @ inputs.weight.double().T).log_softmax(1)
    exact: Tensor = torch.special.entr(logp.exp()).sum(1).masked_fill(inputs.labels[rows] == IGNORED, 0)
    return (found[rows] - exact).abs().max().item()
