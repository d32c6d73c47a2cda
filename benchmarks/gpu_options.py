"""Numeric checks of what the ops are asked for beside log-probs and gradients, on the pattern of ``gpu_checks``.

Legend: N rows, D features, V vocabulary, B row blocks and C column tiles of a filter.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_checks import (
    IGNORED,
    MIDDLE,
    OPTIONS,
    Inputs,
    make_inputs,
    multiple,
    nats,
    our_logps,
    plain_logps,
    plain_slope,
    short,
    split,
    with_gradients,
)
from benchmarks.gpu_table import Check, Context
from dpo_kernels import linear_logps, linear_logps_vocab_parallel
from dpo_kernels.head import Head
from dpo_kernels.linear_logps import reference
from dpo_kernels.linear_logps.ops import linear_logps_op
from dpo_kernels.linear_logps.stats import STATS
from dpo_kernels.linear_logps.tile_filter import Kept, kept_elements

TINY = (5, 33, 300)
FILTER_MASS = 0.05


def option_checks(context: Context) -> Iterator[Check]:
    """Statistics, a filter, a main gradient, a head that is spread over processes."""
    tiny = context.dry_run
    for dtype in (torch.float32,) if tiny else (torch.bfloat16, torch.float16, torch.float32):
        for option in OPTIONS if dtype == torch.bfloat16 else ("everything",):
            label = f"{short(dtype)} {option}"
            arguments = (context.device, dtype, TINY if tiny else MIDDLE, OPTIONS[option])
            yield Check(f"statistics {label}", partial(_stats_error, *arguments, frozen=False), 2.0)
            yield Check(f"statistics frozen head {label}", partial(_stats_error, *arguments, frozen=True), 2.0)
            yield Check(f"filter {label}", partial(_filter_error, *arguments), 2.0)
            yield Check(f"weight_grad {label}", partial(_weight_grad_error, *arguments), 2.0)
            yield Check(f"vocab-parallel {label}", partial(_vocab_parallel_error, *arguments), 2.0)


def _stats_error(device, dtype, shape, option, *, frozen: bool) -> float:
    """Against the definition in float64: nats and hits within rounding, hits only where the top is not shared."""
    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    hidden = inputs.hidden.clone().requires_grad_()
    weight = inputs.weight.clone().requires_grad_(not frozen)
    out = linear_logps(hidden, weight, inputs.labels, bias=inputs.bias, stats=STATS, impl="triton", **options)
    exact = inputs.raised()
    logits = reference.logits(exact.hidden, Head(exact.weight, exact.bias, **options))
    expected = reference.token_stats(logits, inputs.labels, IGNORED, STATS)
    errors = [nats(out.stats[name], expected[k]) for k, name in enumerate(STATS) if name != "is_top1"]
    top = logits.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-2
    wrong = (out.stats["is_top1"] != expected[STATS.index("is_top1")].bool()) & clear
    return max(*errors, float("inf") if bool(wrong.any()) else 0.0, nats(out.logps, plain_logps(exact, **options)))


def _filter_error(device, dtype, shape, option) -> float:
    """The gradients of the tiles that were kept, against the definition on the same tiles; no row loses too much."""
    bias, options = split(option)
    inputs = _peaked(make_inputs(device, dtype, shape, bias=bias))
    upstream = torch.randn(shape[0], device=device)
    numbers = (options.get("softcap"), options.get("logit_scale", 1.0), options.get("temperature", 1.0))
    order, kept = linear_logps_op(*inputs, *numbers, IGNORED, "triton", False, "", None, FILTER_MASS)[-2:]
    kept_NV = kept_elements(Kept(order, kept), shape[2], reference.FILTER_ROWS)

    def of_kept(i: Inputs) -> list[Tensor]:
        slope = plain_slope(i, upstream, options).masked_fill(~kept_NV, 0)
        return [slope @ i.weight, slope.T @ i.hidden, *([] if i.bias is None else [slope.sum(0)])]

    exact = inputs.raised()
    logits = reference.logits(exact.hidden, Head(exact.weight, exact.bias, **options))
    lost = logits.softmax(1).masked_fill(kept_NV, 0).sum(1)[inputs.labels != IGNORED]
    # Masses are sums of fp32 exponentials.
    if not bool((lost <= FILTER_MASS + 1e-3).all()):
        return float("inf")
    ours = with_gradients(partial(our_logps, filter_mass=FILTER_MASS, **options), inputs, upstream, trainable=True)
    errors = itertools.starmap(multiple, zip(ours[1:], of_kept(inputs), of_kept(exact), strict=True))
    return max(nats(ours[0], plain_logps(exact, **options)), *errors)


def _peaked(inputs: Inputs) -> Inputs:
    """Rows that are sure of their label, so that a filter has something to leave out."""
    labels = inputs.labels.clamp(min=0)
    return inputs._replace(hidden=(0.3 * inputs.hidden + 0.7 * inputs.weight[labels]).contiguous())


def _weight_grad_error(device, dtype, shape, option) -> float:
    """The gradient added to a main gradient, which starts as something."""
    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    upstream = torch.randn(shape[0], device=device)
    main = torch.randn(shape[2], shape[1], device=device)
    start = main.double()
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    logps = linear_logps(hidden, weight, inputs.labels, bias=inputs.bias, weight_grad=main, impl="triton", **options)
    logps.backward(upstream)
    assert weight.grad is None, "the weight was handed a gradient, too"
    plain, exact = (plain_slope(i, upstream, options).T @ i.hidden for i in (inputs, inputs.raised()))
    return multiple(main.double() - start, plain, exact)


def _vocab_parallel_error(device, dtype, shape, option) -> float:
    """In a group of one process, whose slice is the whole head: the same numbers as without a group."""
    import torch.distributed as dist

    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    upstream = torch.randn(shape[0], device=device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:

            def spread(i: Inputs) -> Tensor:
                group = dist.group.WORLD
                head = {"bias_shard": i.bias, "group": group, "vocab_start": 0, "impl": "triton", **options}
                return linear_logps_vocab_parallel(i.hidden, i.weight, i.labels, **head)

            ours = with_gradients(spread, inputs, upstream, trainable=True)
        finally:
            dist.destroy_process_group()
    plain, exact = (
        with_gradients(partial(plain_logps, **options), i, upstream, trainable=True) for i in (inputs, inputs.raised())
    )
    return max(nats(ours[0], exact[0]), *itertools.starmap(multiple, zip(ours[1:], plain[1:], exact[1:], strict=True)))
