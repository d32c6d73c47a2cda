"""Numeric checks of the Triton kernels and of both ops, for a machine where they run compiled.

Legend: N rows, D features, V vocabulary, S responses.

Every check compares with float64 of the same inputs and gives one number with a bound. Where rounding decides, the
number is the error as a multiple of the error of the same formula in plain torch in the inputs' dtype, and the bound 2;
log-probs must moreover be within 1e-3 nats, which counts as 2. With ``tiny`` the same checks run on sizes that
Triton's interpreter takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import LOSS_TYPES, linear_dpo_loss, linear_logps, preference_loss
from dpo_kernels.kernels.frozen_head import frozen_head
from dpo_kernels.kernels.launch import HeadOptions
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_logps import empty_exps, linear_stats
from dpo_kernels.linear_dpo import triton_pairs

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
RESPONSES = (3, 170, 90, 1, 300, 20, 64, 64)
TINY_RESPONSES = (3, 7, 5, 1)


class Check(NamedTuple):
    """``run`` returns a number that is at most ``bound`` when all is well."""

    name: str
    run: Callable[[], float]
    bound: float


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None

    def raised(self) -> Inputs:
        return Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in self))  # type: ignore[arg-type]


def all_checks(device: torch.device, *, tiny: bool) -> list[Check]:
    """Checks in the order in which a fault is best found: kernels, ops, their limits."""
    return [*_rounding_checks(device, tiny=tiny), *_pair_checks(device, tiny=tiny), *limit_checks(device, tiny=tiny)]


def _rounding_checks(device: torch.device, *, tiny: bool) -> Iterator[Check]:
    for dtype, shape, option in TINY_PLAN if tiny else PLAN:
        label = f"{_short(dtype)} N={shape[0]} D={shape[1]} V={shape[2]} {option}"
        arguments = (device, dtype, shape, OPTIONS[option])
        for kernel, check in KERNEL_CHECKS.items():
            yield Check(f"kernel {kernel} {label}", _bind(check, *arguments), 2.0)
        for name, trainable in (("4G", True), ("2G", False)):
            yield Check(f"linear_logps {name} {label}", _bind(_logps_error, *arguments, trainable=trainable), 2.0)


def _pair_checks(device: torch.device, *, tiny: bool) -> Iterator[Check]:
    responses = TINY_RESPONSES if tiny else RESPONSES
    single = [name for name in LOSS_TYPES if not name.startswith("aot")]
    for loss_type in ("sigmoid", "nca_pair", "orpo") if tiny else single:
        run = _bind(_pair_error, device, torch.bfloat16, loss_type, responses, chunk_rows=None, tiny=tiny)
        yield Check(f"linear_dpo_loss 3G {loss_type} bfloat16", run, 2.0)
    for dtype in (torch.float32,) if tiny else (torch.float16, torch.float32):
        run = _bind(_pair_error, device, dtype, "sigmoid", responses, chunk_rows=None, tiny=tiny)
        yield Check(f"linear_dpo_loss 3G sigmoid {_short(dtype)}", run, 2.0)
    for rows in (1, 4) if tiny else (1, 128, 256):
        run = _bind(_pair_error, device, torch.bfloat16, "sigmoid", responses, chunk_rows=rows, tiny=tiny)
        yield Check(f"linear_dpo_loss 3G in chunks of {rows} rows", run, 2.0)


def limit_checks(device: torch.device, *, tiny: bool) -> Iterator[Check]:
    """Extreme numbers, bitwise repetition, compilation; offsets past 2^31 where there is room for them."""
    for scale in (1e4, -1e4):
        yield Check(f"logits of {scale:g}", _bind(_extreme_error, device, scale), 1e-3)
    yield Check("all rows ignored give exact zeros", _bind(_ignored_sum, device), 0.0)
    yield Check("two runs are bitwise equal", _bind(_differing_bits, device, tiny), 0.0)
    if device.type == "cuda":
        yield Check("torch.compile(fullgraph=True) changes no bit", _bind(_compiled_difference, device), 0.0)
    size = 300 if tiny else 2**31 + 2**20
    if not tiny and torch.cuda.get_device_properties(device).total_memory < 60 * 2**30:
        return
    yield Check("exponentials past 2^31 elements", _bind(_large_exps_error, device, size, tiny), 2.0)
    yield Check("weight past 2^31 elements", _bind(_large_operand_error, device, size, "weight", tiny), 1e-3)
    yield Check("hidden states past 2^31 elements", _bind(_large_operand_error, device, size, "hidden", tiny), 1e-3)


def _bind(function: Callable[..., float], *args: Any, **kwargs: Any) -> Callable[[], float]:
    return lambda: function(*args, **kwargs)


def _short(dtype: torch.dtype) -> str:
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


def _split(option: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    return option.get("bias", False), {k: v for k, v in option.items() if k != "bias"}


def _final(
    product: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Logits of a product, in its dtype, raised to at least fp32 at the end."""
    logits = logit_scale * product
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).to(torch.promote_types(logits.dtype, torch.float32))


def _label_logps(product: Tensor, labels: Tensor, **options) -> Tensor:
    return -F.cross_entropy(_final(product, **options), labels, reduction="none", ignore_index=IGNORED)


def plain_logps(inputs: Inputs, **options) -> Tensor:
    """The formula through logits in the dtype of the inputs."""
    return _label_logps(F.linear(inputs.hidden, inputs.weight, inputs.bias), inputs.labels, **options)


def _multiple(found: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Error of ``found`` over that of ``plain``, both grown by four roundings: plain values may be right by chance."""
    assert found.shape == exact.shape, f"{list(found.shape)} instead of {list(exact.shape)}"
    unit = 4 * torch.finfo(plain.dtype).eps * exact.abs().max()
    error = (found.double() - exact).abs().max()
    return ((error + unit) / ((plain.double() - exact).abs().max() + unit)).nan_to_num(float("inf")).item()


def _nats(found: Tensor, exact: Tensor) -> float:
    """Error of log-probs, 1e-3 nats counting as 2."""
    assert found.shape == exact.shape, f"{list(found.shape)} instead of {list(exact.shape)}"
    return (2e3 * (found.double() - exact).abs().max()).nan_to_num(float("inf")).item()


def _stats_error(device, dtype, shape, option) -> float:
    bias, options = _split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    found = linear_stats(*inputs[:3], options=HeadOptions(bias_V=inputs.bias, **options), ignore_index=IGNORED)
    return _nats(found.logps_N, plain_logps(inputs.raised(), **options))


def _plain_slope(inputs: Inputs, upstream: Tensor, options: dict[str, Any]) -> Tensor:
    """d (sum upstream * logps) / d (hidden W^T + bias), [N, V], in the dtype of the inputs."""
    product = F.linear(inputs.hidden, inputs.weight, inputs.bias).detach().requires_grad_()
    logps = _label_logps(product, inputs.labels, **options)
    return torch.autograd.grad(logps, product, upstream.to(logps.dtype))[0]


def _softmax_grad_error(device, dtype, shape, option) -> float:
    bias, options = _split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    upstream = torch.randn(shape[0], device=device)
    head = HeadOptions(bias_V=inputs.bias, **options)
    exps = empty_exps(inputs.hidden, shape[2]).fill_(float("nan"))
    stats = linear_stats(*inputs[:3], options=head, ignore_index=IGNORED, exps=exps)
    found = softmax_grad_(exps, upstream, inputs.labels, stats, V=shape[2], ignore_index=IGNORED, options=head)
    return _multiple(found, *(_plain_slope(i, upstream, options) for i in (inputs, inputs.raised())))


def _slice_grad_error(device, dtype, shape, option) -> float:
    bias, options = _split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    exact = inputs.raised()
    upstream = torch.randn(shape[0], device=device)
    lse = _final(F.linear(*exact[:2], exact.bias), **options).logsumexp(dim=1).float()
    columns = slice(shape[2] // 3, shape[2])
    found = inputs.hidden.new_full((shape[0], columns.stop - columns.start), float("nan"))
    slice_grad(
        inputs.hidden,
        inputs.weight[columns],
        inputs.labels,
        lse,
        upstream,
        found,
        first_col=columns.start,
        ignore_index=IGNORED,
        options=HeadOptions(bias_V=inputs.bias, **options).columns(columns.start, columns.stop),
    )
    return _multiple(found, *(_plain_slope(i, upstream, options)[:, columns] for i in (inputs, exact)))


def _frozen_head_error(device, dtype, shape, option) -> float:
    bias, options = _split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    head = HeadOptions(bias_V=inputs.bias, **options)
    # A third of the vocabulary at a time: shifts that change between slices are what can go wrong.
    width = max(1, -(-shape[2] // 3))
    found = frozen_head(*inputs[:3], slice_columns=width, options=head, ignore_index=IGNORED)
    upstream = torch.ones(shape[0], device=device)
    plain, exact = (_plain_slope(i, upstream, options) @ i.weight for i in (inputs, inputs.raised()))
    return max(_nats(found.logps_N, plain_logps(inputs.raised(), **options)), _multiple(found.dx_ND, plain, exact))


KERNEL_CHECKS = {
    "linear_stats": _stats_error,
    "softmax_grad": _softmax_grad_error,
    "slice_grad": _slice_grad_error,
    "frozen_head": _frozen_head_error,
}


def _with_gradients(function, inputs: Inputs, upstream: Tensor, *, trainable: bool, **options) -> list[Tensor]:
    """[logps, dX, dW, db] of what is trainable."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(trainable)
    bias = None if inputs.bias is None else inputs.bias.detach().requires_grad_(trainable)
    logps = function(Inputs(hidden, weight, inputs.labels, bias), **options)
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))]


def _our_logps(inputs: Inputs, **options) -> Tensor:
    return linear_logps(*inputs[:3], bias=inputs.bias, impl="triton", **options)


def _logps_error(device, dtype, shape, option, *, trainable: bool) -> float:
    bias, options = _split(option)
    inputs = make_inputs(device, dtype, shape, bias=bias)
    upstream = torch.randn(shape[0], device=device)
    ours, plain, exact = (
        _with_gradients(function, i, upstream, trainable=trainable, **options)
        for function, i in ((_our_logps, inputs), (plain_logps, inputs), (plain_logps, inputs.raised()))
    )
    return max(
        _nats(ours[0], exact[0]), *itertools.starmap(_multiple, zip(ours[1:], plain[1:], exact[1:], strict=True))
    )


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
        found = _with_gradients(ours, inputs, one, trainable=True)
    others = (_with_gradients(plain, i, one, trainable=True) for i in (inputs, inputs.raised()))
    return max(itertools.starmap(_multiple, zip(found, *others, strict=True)))


def _response_sums(values: Tensor, responses: tuple[int, ...]) -> Tensor:
    return torch.stack([part.sum() for part in values.split(list(responses))])


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
    ours = _with_gradients(_our_logps, inputs, upstream, trainable=True)
    exact = _with_gradients(plain_logps, inputs.raised(), upstream, trainable=True)
    if not all(t.isfinite().all() for t in ours):
        return float("inf")
    return ((ours[0] - exact[0]).abs() / exact[0].abs().clamp(min=1)).max().item()


def _ignored_sum(device) -> float:
    inputs = make_inputs(device, torch.bfloat16, (37, 64, 130), bias=True)
    inputs = inputs._replace(labels=torch.full_like(inputs.labels, IGNORED))
    found = _with_gradients(_our_logps, inputs, torch.ones(37, device=device), trainable=True)
    return sum(t.abs().sum().item() for t in found)


def _differing_bits(device, tiny: bool) -> float:
    """Elements that differ between two runs of both ops."""
    shape = (24, 33, 70) if tiny else (2048, 1024, 32001)
    inputs = make_inputs(device, torch.bfloat16, shape, bias=True)
    cu_responses = torch.linspace(0, shape[0], 9).to(torch.int32)
    reference = torch.zeros(8, device=device)

    def loss(i: Inputs) -> Tensor:
        return linear_dpo_loss(*i[:3], cu_responses, reference, bias=i.bias, impl="triton").loss

    upstream = torch.randn(shape[0], device=device)
    runs = []
    for _ in range(2):
        logps = _with_gradients(_our_logps, inputs, upstream, trainable=True)
        runs.append([*logps, *_with_gradients(loss, inputs, torch.ones((), device=device), trainable=True)])
    return float(sum((a != b).sum().item() for a, b in zip(*runs, strict=True)))


def _large_exps_error(device, size: int, tiny: bool) -> float:
    """A buffer of ``size`` exponentials: the gradient of its last rows."""
    D, V = (33, 70) if tiny else (64, 128256)
    N = -(-size // V)
    inputs = make_inputs(device, torch.bfloat16, (N, D, V), bias=False)
    upstream = torch.randn(N, device=device)
    exps = empty_exps(inputs.hidden, V)
    stats = linear_stats(*inputs[:3], options=HeadOptions(), ignore_index=IGNORED, exps=exps)
    found = softmax_grad_(exps, upstream, inputs.labels, stats, V=V, ignore_index=IGNORED, options=HeadOptions())
    rows = slice(max(0, N - 64), N)
    last = Inputs(inputs.hidden[rows], inputs.weight, inputs.labels[rows], None)
    return _multiple(found[rows], *(_plain_slope(i, upstream[rows], {}) for i in (last, last.raised())))


def _large_operand_error(device, size: int, operand: str, tiny: bool) -> float:
    """Weight or hidden states of ``size`` elements: log-probs of its last rows."""
    D = 33 if tiny else 16896
    many, few = -(-size // D), 64
    shape = (few, D, many) if operand == "weight" else (many, D, few)
    inputs = make_inputs(device, torch.bfloat16, shape, bias=False)
    found = linear_logps(*inputs[:3], impl="triton")
    rows = slice(max(0, shape[0] - 64), shape[0])
    # fp32 in the comparison: a float64 copy of the weight would be 16 GiB, and the bound is far above fp32's error.
    last = Inputs(inputs.hidden[rows].float(), inputs.weight.float(), inputs.labels[rows], None)
    return (found[rows] - plain_logps(last)).abs().max().item()


def _compiled_difference(device) -> float:
    inputs = make_inputs(device, torch.bfloat16, (512, 256, 8192), bias=False)
    upstream = torch.randn(512, device=device)
    compiled = torch.compile(_our_logps, fullgraph=True)
    runs = [_with_gradients(f, inputs, upstream, trainable=True) for f in (_our_logps, compiled)]
    return float(sum((a != b).sum().item() for a, b in zip(*runs, strict=True)))
