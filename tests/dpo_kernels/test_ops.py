"""Registration with ``torch.library``: opcheck, whole-graph compilation, and life inside other machinery."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

from dpo_kernels import linear_dpo_loss, linear_logps
from dpo_kernels.linear_dpo.ops import linear_dpo_op, response_sums
from dpo_kernels.linear_logps.ops import linear_logps_backward_op, linear_logps_op

LOSS_OPTIONS = [0.1, 0.0, 0.05, 0.5, 1.0]


def inputs(T: int = 11, D: int = 5, V: int = 13, dtype: torch.dtype = torch.float32):
    labels = torch.randint(0, V, (T,))
    if T:
        labels[T // 2] = -100
    return (
        torch.randn(T, D).to(dtype).requires_grad_(),
        torch.randn(V, D).to(dtype).requires_grad_(),
        labels,
        torch.randn(V).to(dtype).requires_grad_(),
    )


@pytest.mark.parametrize(
    ("num_rows", "dtype", "impl"),
    [
        (0, torch.float32, "torch"),
        (11, torch.float32, "torch"),
        (11, torch.bfloat16, "torch"),
        (1, torch.float64, "torch"),
        (11, torch.bfloat16, "reference"),
    ],
)
def test_opcheck_linear_logps(num_rows: int, dtype: torch.dtype, impl: str) -> None:
    hidden, weight, labels, bias = inputs(num_rows, dtype=dtype)
    opcheck(linear_logps_op, (hidden, weight, labels, bias, 3.0, 1.5, 0.8, -100, impl, False, ""))
    opcheck(linear_logps_op, (hidden, weight, labels, bias, 3.0, 1.5, 0.8, -100, impl, False, "is_top1,entropy"))
    opcheck(linear_logps_op, (hidden, weight.detach(), labels, None, None, 1.0, 1.0, -100, impl, True, "entropy"))
    logps, lse, *_ = linear_logps_op(hidden, weight, labels, bias, 3.0, 1.5, 0.8, -100, impl, False, "")
    frozen = [t.detach() for t in (hidden, weight, labels, lse, bias)]
    for needs in ((True, True, True), (False, True, False)):
        opcheck(linear_logps_backward_op, (torch.randn_like(logps), *frozen, 3.0, 1.5, 0.8, -100, impl, *needs))


@pytest.mark.parametrize(
    ("dtype", "impl"), [(torch.float32, "torch"), (torch.float16, "torch"), (torch.float16, "reference")]
)
def test_opcheck_linear_dpo(dtype: torch.dtype, impl: str) -> None:
    hidden, weight, labels, bias = inputs(dtype=dtype)
    cu = torch.tensor([0, 3, 5, 5, 11], dtype=torch.int32)
    lengths, ref = torch.tensor([3.0, 2.0, 0.0, 5.0]), torch.randn(4)
    losses = [
        ("sigmoid", ref, None, None),
        ("sigmoid,sft", ref, lengths, lengths.mean()),
        ("simpo", None, lengths, None),
    ]
    for (loss_type, ref_logps, lengths_S, mean_length), mean in itertools.product(losses, (True, False)):
        weights = [1.0] * (loss_type.count(",") + 1)
        opcheck(
            linear_dpo_op,
            (
                *(hidden, weight, labels, cu, ref_logps, lengths_S, mean_length, torch.rand(2), bias),
                *(loss_type, weights, LOSS_OPTIONS, mean, 3.0, 1.5, 0.8, -100, impl, True, True, True),
                *((None, "is_top1,entropy") if mean else ()),
            ),
        )
    constants = (None, "", torch.rand(2), torch.rand(11))
    opcheck(
        linear_dpo_op,
        (
            *(hidden, weight, labels, cu, ref, lengths, None, torch.rand(2), bias, "sigmoid,hinge", [1.0, 0.5]),
            *([*LOSS_OPTIONS, 3.0, 0.9, 2, 0.5], True, 3.0, 1.5, 0.8, -100, impl, True, True, True, *constants),
        ),
    )


def test_opcheck_response_sums() -> None:
    for cu in (torch.tensor([0, 3, 3, 7]), torch.tensor([0], dtype=torch.int32)):
        opcheck(response_sums, (torch.randn(int(cu[-1]), requires_grad=True), cu))


def dpo(hidden, weight, labels, cu, ref, bias, loss_type, reduction):
    out = linear_dpo_loss(
        hidden, weight, labels, cu, ref, bias=bias, loss_type=loss_type, reduction=reduction, softcap=3.0
    )
    return (out.loss * 1.5).sum(), out.logps, out.chosen_rewards


def dpo_with_constants(hidden, weight, labels, cu, ref, bias, loss_type, reduction):
    options = {"token_weights": hidden.detach()[:, 0].abs(), "margins": ref[::2].abs(), "reduction": reduction}
    out = linear_dpo_loss(
        hidden, weight, labels, cu, ref, bias=bias, loss_type=loss_type, f_divergence_type="js_divergence", **options
    )
    return (out.loss * 1.5).sum(), out.logps, out.chosen_rewards


def dpo_with_stats(hidden, weight, labels, cu, ref, bias, loss_type, reduction):
    names = ("entropy", "is_top1")
    out = linear_dpo_loss(hidden, weight, labels, cu, ref, bias=bias, loss_type=loss_type, stats=names)
    return (out.loss * 1.5, out.logps, *out.stats.values())


def logps(hidden, weight, labels, cu, ref, bias, loss_type, reduction):
    return (linear_logps(hidden, weight, labels, bias=bias, softcap=3.0) * 1.5).sum(), hidden.sum()


def logps_with_stats(hidden, weight, labels, cu, ref, bias, loss_type, reduction):
    out = linear_logps(hidden, weight, labels, bias=bias, softcap=3.0, stats=("entropy", "is_top1"))
    return (out.logps * 1.5).sum(), out.stats["entropy"], out.stats["is_top1"]


@pytest.mark.parametrize(
    ("function", "loss_type", "reduction", "frozen", "backend"),
    [
        (logps_with_stats, "", "", False, "aot_eager"),
        (logps, "", "", False, "inductor"),
        (logps, "", "", True, "aot_eager"),
        (dpo, "sigmoid", "mean", False, "inductor"),
        (dpo, "sigmoid", "mean", True, "aot_eager"),
        (dpo_with_stats, "sigmoid", "mean", False, "aot_eager"),
        (dpo_with_constants, "sigmoid", "mean", False, "aot_eager"),
        (dpo, "sft", "none", False, "aot_eager"),
        (dpo, "aot", "sum", False, "aot_eager"),
    ],
)
def test_compiles_whole_with_dynamic_lengths(function, loss_type, reduction, frozen: bool, backend: str) -> None:
    """One graph, forward and backward, the values of eager, and no second compilation for other lengths."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for lengths in ((3, 4, 2, 6), (5, 5, 1, 2, 7, 3), (2, 9, 4, 4, 4, 6, 8, 8)):
        cu = torch.tensor([0, *itertools.accumulate(lengths)])
        hidden, weight, labels, bias = inputs(sum(lengths), D=71, V=53)
        ref = torch.randn(len(lengths))
        leaves = [hidden] if frozen else [hidden, weight, bias]
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        arguments = (hidden, weight, labels, cu, ref, bias, loss_type, reduction)
        found, expected = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out[0], leaves) for out in (found, expected)))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_gradient_checkpointing() -> None:
    hidden, weight, labels, _ = inputs()
    cu, ref = torch.tensor([0, 6, 11]), torch.randn(2)

    def loss(hidden, weight):
        return linear_dpo_loss(hidden * 2, weight, labels, cu, ref).loss

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for reentrant in (True, False):
        again = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=reentrant)
        again.backward()
        torch.testing.assert_close((hidden.grad, weight.grad), expected)
        hidden.grad = weight.grad = None


class HeadAndLoss(torch.nn.Module):
    def __init__(self, D: int, V: int):
        super().__init__()
        self.body = torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, V)

    def forward(self, x, labels, cu, ref):
        return linear_dpo_loss(self.body(x), self.head.weight, labels, cu, ref, bias=self.head.bias).loss


def test_inside_distributed_data_parallel(tmp_path) -> None:
    """Inside the forward of DDP, with the gradients of the bare module."""
    hidden, _, labels, _ = inputs()
    batch = (hidden.detach(), labels, torch.tensor([0, 6, 11]), torch.randn(2))
    module = HeadAndLoss(5, 13)
    module(*batch).backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(module)(*batch).backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_tied_weight_collects_both_gradients() -> None:
    """An embedding that is also the head: the two uses add up."""
    embedding = torch.nn.Embedding(13, 5).double()
    tokens, labels = torch.randint(0, 13, (11,)), torch.randint(0, 13, (11,))
    cu, ref = torch.tensor([0, 6, 11]), torch.randn(2)

    def gradient(detach_input: bool, detach_head: bool) -> torch.Tensor:
        weight = embedding.weight.detach() if detach_head else embedding.weight
        x = embedding(tokens)
        out = linear_dpo_loss(x.detach() if detach_input else x, weight, labels, cu, ref)
        return torch.autograd.grad(out.loss, embedding.weight)[0]

    torch.testing.assert_close(gradient(False, False), gradient(True, False) + gradient(False, True))
