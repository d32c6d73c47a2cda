"""Numeric checks of the Triton kernels and of both ops, for a machine where they run compiled.

Legend: N rows, D features, V vocabulary, S responses.

Every check compares with float64 of the same inputs and gives one number with a bound. Where rounding decides, the
number is the error as a multiple of the error of the same formula in plain torch in the inputs' dtype, and the bound 2;
log-probs must moreover be within 1e-3 nats, which counts as 2. With ``tiny`` the same checks run on sizes that
Triton's interpreter takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_table import Check, Context, SkippedError
from dpo_kernels import LOSS_TYPES, linear_dpo_loss, linear_logps, preference_loss
from dpo_kernels.head import Head
from dpo_kernels.kernels import bfloat16_weights
from dpo_kernels.kernels.frozen_head import frozen_head
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_logps import empty_exps, score_rows
from dpo_kernels.linear_dpo import triton_pairs
from engine.train import bfloat16

IGNORED = -100
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "softcap": 2.5, "logit_scale": 0.6, "temperature": 0.7},
}
MIDDLE, LARGE = (300, 127, 1000), (1024, 1024, 50257)
PLAN = (
    *((torch.bfloat16, shape, "plain") for shape in ((127, 64, 128), (129, 33, 129), (2, 512, 32001), LARGE)),
    *((torch.bfloat16, MIDDLE, option) for option in OPTIONS),
    *((dtype, MIDDLE, "everything") for dtype in (torch.float16, torch.float32)),
    *((dtype, LARGE, "plain") for dtype in (torch.float16, torch.float32)),
)
"""Few enough that compiling their kernels takes no more than a minute or two."""
TINY_PLAN = ((torch.bfloat16, (5, 33, 70), "everything"), (torch.float32, (5, 33, 70), "plain"))
WEIGHTS, TINY_WEIGHTS, WINDOW = (1, 2**20 + 77, 2**31 + 5000), (1, 5000), 2**22
RESPONSES = (3, 170, 90, 1, 300, 20, 64, 64)
TINY_RESPONSES = (3, 7, 5, 1)


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None

    def raised(self) -> Inputs:
        return Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in self))  # type: ignore[arg-type]


def kernel_checks(context: Context) -> list[Check]:
    """Checks in the order in which a fault is best found: kernels, then ops."""
    device, tiny = context.device, context.dry_run
    weights = [
        Check(f"kernels of bfloat16 weights, {n:,} of them", partial(_weights_error, device, n), 0.0)
        for n in (TINY_WEIGHTS if tiny else WEIGHTS)
    ]
    return [*_rounding_checks(device, tiny=tiny), *weights, *_pair_checks(device, tiny=tiny)]


def _rounding_checks(device: torch.device, *, tiny: bool) -> Iterator[Check]:
    for dtype, shape, option in TINY_PLAN if tiny else PLAN:
        label = f"{short(dtype)} N={shape[0]} D={shape[1]} V={shape[2]} {option}"
        arguments = (device, dtype, shape, OPTIONS[option])
        for kernel, check in KERNEL_CHECKS.items():
            yield Check(f"kernel {kernel} {label}", partial(check, *arguments), 2.0)
        for name, trainable in (("4G", True), ("2G", False)):
            yield Check(f"linear_logps {name} {label}", partial(_logps_error, *arguments, trainable=trainable), 2.0)


def _pair_checks(device: torch.device, *, tiny: bool) -> Iterator[Check]:
    responses = TINY_RESPONSES if tiny else RESPONSES
    single = [name for name in LOSS_TYPES if not name.startswith("aot")]
    for loss_type in ("sigmoid", "nca_pair", "orpo") if tiny else single:
        run = partial(_pair_error, device, torch.bfloat16, loss_type, responses, chunk_rows=None, tiny=tiny)
        yield Check(f"linear_dpo_loss 3G {loss_type} bfloat16", run, 2.0)
    for dtype in (torch.float32,) if tiny else (torch.float16, torch.float32):
        run = partial(_pair_error, device, dtype, "sigmoid", responses, chunk_rows=None, tiny=tiny)
        yield Check(f"linear_dpo_loss 3G sigmoid {short(dtype)}", run, 2.0)
    for rows in (1, 4) if tiny else (1, 128, 256):
        run = partial(_pair_error, device, torch.bfloat16, "sigmoid", responses, chunk_rows=rows, tiny=tiny)
        yield Check(f"linear_dpo_loss 3G in chunks of {rows} rows", run, 2.0)
    for dtype in (torch.float32,) if tiny else (torch.bfloat16, torch.float16, torch.float32):
        run = partial(_pair_error, device, dtype, "sigmoid", (3, 0, 0, 5), chunk_rows=None, tiny=tiny)
        yield Check(f"linear_dpo_loss 3G responses without tokens {short(dtype)}", run, 2.0)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_inputs(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], *, bias: bool) -> Inputs:
    """Logits of standard deviation 3; every seventh row ignored; labels on the edges of the vocabulary."""
    N, D, V = shape
    generator = torch.Generator(device).manual_seed(N + D + V)
    draw: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(N, D, **draw).to(dtype)
    weight = (torch.randn(V, D, **draw) * (3 / D**0.5)).to(dtype)
    labels = torch.randint(V, (N,), **draw)
    labels[0], labels[-1] = V - 1, 0
    labels[3::7] = IGNORED
    return Inputs(hidden, weight, labels, torch.randn(V, **draw).to(dtype) if bias else None)


def split(option: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    return option.get("bias", False), {k: v for k, v in option.items() if k != "bias"}


def final(
    product: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Logits of a product, in its dtype, raised to at least fp32 at the end."""
    logits = logit_scale * product
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).to(torch.promote_types(logits.dtype, torch.float32))


def label_logps(product: Tensor, labels: Tensor, **options) -> Tensor:
    return -F.cross_entropy(final(product, **options), labels, reduction="none", ignore_index=IGNORED)


def plain_logps(inputs: Inputs, **options) -> Tensor:
    """The formula through logits in the dtype of the inputs."""
    return label_logps(F.linear(inputs.hidden, inputs.weight, inputs.bias), inputs.labels, **options)


def multiple(found: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Error of ``found`` over that of ``plain``, both grown by four roundings: plain values may be right by chance."""
    assert found.shape == exact.shape, f"{list(found.shape)} instead of {list(exact.shape)}"
    unit = 4 * torch.finfo(plain.dtype).eps * exact.abs().max()
    error = (found.double() - exact).abs().max()
    return ((error + unit) / ((plain.double() - exact).abs().max() + unit)).nan_to_num(float("inf")).item()


def nats(found: Tensor, exact: Tensor) -> float:
    """Error of log-probs, 1e-3 nats counting as 2."""
    assert found.shape == exact.shape, f"{list(found.shape)} instead of {list(exact.shape)}"
    return (2e3 * (found.double() - exact).abs().max()).nan_to_num(float("inf")).item()


def _stats_error(device, dtype, shape, option) -> float:
    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    head = Head(inputs.weight, inputs.bias, **options)
    found = score_rows(inputs.hidden, head, inputs.labels, ignore_index=IGNORED)
    return nats(found.logps_T, plain_logps(inputs.raised(), **options))


def plain_slope(inputs: Inputs, upstream: Tensor, options: dict[str, Any]) -> Tensor:
    """d (sum upstream * logps) / d (hidden W^T + bias), [N, V], in the dtype of the inputs."""
    product = F.linear(inputs.hidden, inputs.weight, inputs.bias).detach().requires_grad_()
    logps = label_logps(product, inputs.labels, **options)
    return torch.autograd.grad(logps, product, upstream.to(logps.dtype))[0]


def _softmax_grad_error(device, dtype, shape, option) -> float:
    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    upstream = torch.randn(shape[0], device=device)
    head = Head(inputs.weight, inputs.bias, **options)
    exps = empty_exps(inputs.hidden, shape[2]).fill_(float("nan"))
    stats = score_rows(inputs.hidden, head, inputs.labels, ignore_index=IGNORED, exps=exps)
    found = softmax_grad_(exps, upstream, head, inputs.labels, stats, ignore_index=IGNORED)
    return multiple(found, *(plain_slope(i, upstream, options) for i in (inputs, inputs.raised())))


def _slice_grad_error(device, dtype, shape, option) -> float:
    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    exact = inputs.raised()
    upstream = torch.randn(shape[0], device=device)
    lse = final(F.linear(*exact[:2], exact.bias), **options).logsumexp(dim=1).float()
    columns = slice(shape[2] // 3, shape[2])
    width = columns.stop - columns.start
    found = empty_exps(inputs.hidden, width).fill_(float("nan"))
    slice_grad(
        inputs.hidden,
        Head(inputs.weight, inputs.bias, **options).columns(columns),
        inputs.labels,
        lse,
        upstream,
        found,
        first_col=columns.start,
        ignore_index=IGNORED,
    )
    got = found[: shape[0], :width]
    return multiple(got, *(plain_slope(i, upstream, options)[:, columns] for i in (inputs, exact)))


def _frozen_head_error(device, dtype, shape, option) -> float:
    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    head = Head(inputs.weight, inputs.bias, **options)
    # A third of the vocabulary at a time: shifts that change between slices are what can go wrong.
    width = max(1, -(-shape[2] // 3))
    found = frozen_head(inputs.hidden, head, inputs.labels, slice_columns=width, ignore_index=IGNORED)
    upstream = torch.ones(shape[0], device=device)
    plain, exact = (plain_slope(i, upstream, options) @ i.weight for i in (inputs, inputs.raised()))
    return max(nats(found.logps_T, plain_logps(inputs.raised(), **options)), multiple(found.dx_TD, plain, exact))


KERNEL_CHECKS = {
    "linear_stats": _stats_error,
    "softmax_grad": _softmax_grad_error,
    "slice_grad": _slice_grad_error,
    "frozen_head": _frozen_head_error,
}


def with_gradients(function, inputs: Inputs, upstream: Tensor, *, trainable: bool, **options) -> list[Tensor]:
    """[logps, dX, dW, db] of what is trainable."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(trainable)
    bias = None if inputs.bias is None else inputs.bias.detach().requires_grad_(trainable)
    logps = function(Inputs(hidden, weight, inputs.labels, bias), **options)
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))]


def our_logps(inputs: Inputs, **options) -> Tensor:
    return linear_logps(*inputs[:3], bias=inputs.bias, impl="triton", **options)


def _logps_error(device, dtype, shape, option, *, trainable: bool) -> float:
    bias, options = split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    upstream = torch.randn(shape[0], device=device)
    ours, plain, exact = (
        with_gradients(function, i, upstream, trainable=trainable, **options)
        for function, i in ((our_logps, inputs), (plain_logps, inputs), (plain_logps, inputs.raised()))
    )
    return max(nats(ours[0], exact[0]), *itertools.starmap(multiple, zip(ours[1:], plain[1:], exact[1:], strict=True)))


def _weights_error(device, size) -> float:
    """First and last weights that are rounded, divided or put together to other bits than operators of torch give."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 10 * size:
        raise SkippedError(f"{10 * size / 2**30:.0f} GiB are not free")
    draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(size), "device": device}
    values = torch.randint(-(2**31), 2**31, (size,), dtype=torch.int32, **draw).view(torch.float32)
    upper, rest = (torch.empty(size, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.int16))
    ends = [slice(0, WINDOW), slice(max(0, size - WINDOW), size)]
    before, wrong = [(end, values[end].clone()) for end in ends], 0
    numbers, start = {"key": 0xC0FFEE11, "update": 1000}, 2**31 - 100
    with mock.patch.object(bfloat16, "kernels_for", return_value=bfloat16_weights):
        bfloat16.round_at_random(upper, values, start=start, **numbers)
    with mock.patch.object(bfloat16, "kernels_for", return_value=None):
        for end, part in before:
            expected = torch.empty_like(upper[end])
            bfloat16.round_at_random(expected, part, start=start + end.start, **numbers)
            wrong += _unlike(upper[end], expected)
    with mock.patch.object(bfloat16, "kernels_for", return_value=bfloat16_weights):
        bfloat16.split(upper, rest, values)
        bfloat16.joined(upper, rest, out=values.zero_())
    with mock.patch.object(bfloat16, "kernels_for", return_value=None):
        for end, part in before:
            bfloat16.split(expected := torch.empty_like(upper[end]), rests := torch.empty_like(rest[end]), part)
            pairs = ((upper[end].view(torch.int16), expected.view(torch.int16)), (rest[end], rests))
            wrong += sum(_unlike(*pair) for pair in (*pairs, (values[end].view(torch.int32), part.view(torch.int32))))
    return float(wrong)


def _unlike(found: Tensor, expected: Tensor) -> int:
    """Elements of other bits, or of numbers; one NaN is like another."""
    unlike = found != expected
    if found.is_floating_point():
        unlike = (found.view(torch.int16) != expected.view(torch.int16)) & ~(found.isnan() & expected.isnan())
    return int(unlike.sum())


def _pair_error(device, dtype, loss_type, responses, *, chunk_rows: int | None, tiny: bool) -> float:
    """Uneven responses; with ``chunk_rows`` the chunks are so small that pairs are split."""
    D, V = (33, 70) if tiny else (256, 8192)
    inputs = make_inputs(device, dtype, (sum(responses), D, V), bias=True)
    cu_responses = torch.tensor([0, *responses]).cumsum(0).to(torch.int32)
    generator = torch.Generator(device).manual_seed(5)
    # Near the policy, so that no loss saturates.
    reference = _response_sums(plain_logps(inputs.raised()), responses)
    reference += 5 * torch.randn(len(responses), generator=generator, device=device)
    options = {"loss_type": loss_type, "label_smoothing": 0.1}

    def ours(i: Inputs) -> Tensor:
        return linear_dpo_loss(*i[:3], cu_responses, reference, bias=i.bias, impl="triton", **options).loss

    def plain(i: Inputs) -> Tensor:
        sums = _response_sums(plain_logps(i), responses)
        lengths = _response_sums((i.labels != IGNORED).to(sums.dtype), responses)
        sides = [values[side::2] for values in (sums, reference) for side in (0, 1)]
        return preference_loss(
            *sides, chosen_lengths=lengths[0::2], rejected_lengths=lengths[1::2], **options
        ).loss.mean()

    one = torch.ones((), device=device)
    small = mock.patch.object(triton_pairs, "chunk_rows", return_value=chunk_rows)
    with nullcontext() if chunk_rows is None else small:
        found = with_gradients(ours, inputs, one, trainable=True)
    others = (with_gradients(plain, i, one, trainable=True) for i in (inputs, inputs.raised()))
    return max(itertools.starmap(multiple, zip(found, *others, strict=True)))


def _response_sums(values: Tensor, responses: tuple[int, ...]) -> Tensor:
    return torch.stack([part.sum() for part in values.split(list(responses))])
