"""``linear_logps``: values and gradients of every implementation that runs on the CPU, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import TEST_SHAPES, HeadShape
from dpo_kernels import chunks, linear_logps
from dpo_kernels.linear_logps import native, slices, torch_chunks
from tests.dpo_kernels.native_setup import NATIVE

IMPLS = ("torch", "reference")
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale and temperature": {"logit_scale": 0.6, "temperature": 1.7},
    "everything": {"bias": True, "softcap": 2.5, "logit_scale": -0.6, "temperature": 0.7},
}


def make_inputs(shape: HeadShape, dtype: torch.dtype = torch.float64, *, bias: bool = False, spread: float = 1.0):
    """hidden, weight, labels (about one in five ignored), bias; logits of standard deviation ``spread``."""
    hidden = torch.randn(shape.T, shape.D, dtype=torch.float64)
    weight = torch.randn(shape.V, shape.D, dtype=torch.float64) * (spread / shape.D**0.5)
    labels = torch.randint(0, shape.V, (shape.T,))
    labels[torch.rand(shape.T) < 0.2] = -100
    offset = torch.randn(shape.V, dtype=torch.float64).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), labels, offset


def run(hidden, weight, labels, bias=None, upstream=None, function=linear_logps, **options) -> list[torch.Tensor]:
    """[logps, dX, dW, db] on fresh leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logps = function(*leaves[:2], labels, bias=leaves[2] if bias is not None else None, **options)
    upstream = torch.ones_like(logps) if upstream is None else upstream.to(logps.dtype)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream)]


def torch_logps(
    hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, temperature=1.0, ignore_index=-100
):
    """The same through logits in the dtype of the inputs, as a model's own head computes them."""
    logits = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(
        (logits / temperature).to(torch.promote_types(hidden.dtype, torch.float32)),
        labels,
        reduction="none",
        ignore_index=ignore_index,
    )


def assert_as_exact_as_torch(inputs, upstream, impl: str, **options) -> None:
    """Error against float64 of the same inputs at most twice that of torch in the same dtype, plus 4 roundings."""
    hidden, weight, labels, bias = inputs
    raised = [None if t is None else t.double() for t in (hidden, weight, bias)]
    exact = run(raised[0], raised[1], labels, raised[2], upstream, function=torch_logps, **options)
    naive = run(hidden, weight, labels, bias, upstream, function=torch_logps, **options)
    ours = run(hidden, weight, labels, bias, upstream, impl=impl, **options)
    for name, truth, theirs, found in zip(("logps", "dX", "dW", "db"), exact, naive, ours, strict=False):
        assert found.dtype == theirs.dtype
        assert found.shape == theirs.shape
        if truth.numel() == 0:
            continue
        unit = 4 * torch.finfo(found.dtype).eps * truth.abs().max()
        bound = 2 * (theirs.double() - truth).abs().max() + unit
        assert (found.double() - truth).abs().max() <= bound, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_against_cross_entropy(options: dict) -> None:
    """The twin that defines what is right agrees with an independent formula."""
    inputs = make_inputs(HeadShape(40, 7, 31), bias=options.get("bias", False))
    rest = {k: v for k, v in options.items() if k != "bias"}
    upstream = torch.randn(40)
    ours = run(*inputs, upstream=upstream, impl="reference", **rest)
    torch.testing.assert_close(ours, run(*inputs, upstream=upstream, function=torch_logps, **rest))


@pytest.mark.parametrize("impl", ["torch", *NATIVE])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", TEST_SHAPES, ids=str)
def test_float32_on_every_shape(shape: HeadShape, options: dict, impl: str) -> None:
    inputs = make_inputs(shape, torch.float32, bias=options.get("bias", False), spread=2.0)
    rest = {k: v for k, v in options.items() if k != "bias"}
    assert_as_exact_as_torch(inputs, torch.randn(shape.T), impl, **rest)


@pytest.mark.parametrize("impl", IMPLS + NATIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
def test_16_bit(impl: str, dtype: torch.dtype, options: dict) -> None:
    inputs = make_inputs(HeadShape(60, 33, 999), dtype, bias=options.get("bias", False), spread=2.0)
    rest = {k: v for k, v in options.items() if k != "bias"}
    assert_as_exact_as_torch(inputs, torch.randn(60), impl, **rest)


@pytest.mark.parametrize("impl", IMPLS + NATIVE)
def test_bfloat16_log_probs_are_not_rounded(impl: str) -> None:
    """Logits that reach the log-sum-exp in float32: 1e-3 a token, 0.02 nats a response of 1000 tokens."""
    hidden, weight, labels, _ = make_inputs(HeadShape(1000, 64, 2000), torch.bfloat16, spread=4.0)
    exact = torch_logps(hidden.double(), weight.double(), labels)
    ours = linear_logps(hidden, weight, labels, impl=impl)
    assert (ours - exact).abs().max() <= 1e-3
    assert abs(ours.double().sum() - exact.sum()) <= 0.02


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_slices_do_not_change_the_result(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices of the vocabulary and many row blocks give what one of each gives, with and without a frozen head."""
    hidden, weight, labels, bias = make_inputs(HeadShape(50, 7, 517), bias=options.get("bias", False), spread=3.0)
    rest = {k: v for k, v in options.items() if k != "bias"}
    upstream = torch.randn(50)
    expected = run(hidden, weight, labels, bias, upstream, impl="reference", **rest)
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 64)
    monkeypatch.setattr(chunks, "CACHE_BYTES", 5000)
    torch.testing.assert_close(run(hidden, weight, labels, bias, upstream, impl="torch", **rest), expected)
    hidden.requires_grad_()
    logps = linear_logps(hidden, weight, labels, bias=bias, impl="torch", **rest)
    logps.backward(upstream.double())
    torch.testing.assert_close([logps.detach(), hidden.grad], expected[:2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_frozen_inputs_get_no_gradient(impl: str, trained: tuple[int, ...]) -> None:
    hidden, weight, labels, bias = make_inputs(HeadShape(20, 7, 31), bias=True)
    upstream = torch.randn(20).double()
    expected = run(hidden, weight, labels, bias, upstream, impl="reference")[1:]
    leaves = [t.requires_grad_(bool(needed)) for t, needed in zip((hidden, weight, bias), trained, strict=True)]
    linear_logps(hidden, weight, labels, bias=bias, impl=impl).backward(upstream)
    for leaf, needed, gradient in zip(leaves, trained, expected, strict=True):
        if needed:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


def test_frozen_weight_is_not_multiplied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a frozen head the gradient is there after forward: backward calls no implementation."""
    hidden, weight, labels, _ = make_inputs(HeadShape(20, 7, 31))
    logps = linear_logps(hidden.requires_grad_(), weight, labels)

    def fail(*args):
        raise AssertionError("backward of a frozen head must not run a product")

    for module in (torch_chunks, native):
        monkeypatch.setattr(module, "backward", fail)
    logps.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(impl: str, frozen: bool) -> None:
    hidden, weight, labels, bias = make_inputs(HeadShape(5, 3, 11), bias=True)
    labels[:2] = torch.tensor([4, -100])

    def call(hidden, weight, bias):
        return linear_logps(hidden, weight, labels, bias=bias, impl=impl, softcap=2.0, logit_scale=1.3, temperature=0.8)

    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


@pytest.mark.parametrize("impl", IMPLS + NATIVE)
@pytest.mark.parametrize("frozen", [False, True])
def test_ignored_rows_are_exactly_zero(impl: str, frozen: bool) -> None:
    """Whatever stands in an ignored row, it gives 0, gets 0, and changes no bit elsewhere."""
    hidden, weight, labels, _ = make_inputs(HeadShape(30, 7, 31), torch.float32)
    labels[4] = 3
    labels[5:9] = -100
    weight.requires_grad_(not frozen)
    upstream = torch.randn(30)
    results = []
    for filler in (0.0, 1e4):
        x = hidden.clone()
        x[labels == -100] = filler
        x.requires_grad_()
        weight.grad = None
        logps = linear_logps(x, weight, labels, impl=impl)
        logps.backward(upstream)
        assert logps[labels == -100].eq(0).all()
        assert x.grad[labels == -100].eq(0).all()
        results.append([logps.detach(), x.grad] + ([] if frozen else [weight.grad]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if impl == "reference" else 0)


@pytest.mark.parametrize("impl", IMPLS + NATIVE)
def test_all_rows_ignored_and_no_rows(impl: str) -> None:
    for num_rows in (0, 6):
        hidden, weight, _, bias = make_inputs(HeadShape(num_rows, 5, 9), torch.float32, bias=True)
        logps, *gradients = run(hidden, weight, torch.full((num_rows,), -100), bias, impl=impl)
        assert logps.shape == (num_rows,)
        assert all(t.eq(0).all() for t in (logps, *gradients))
        assert [g.shape for g in gradients] == [hidden.shape, weight.shape, bias.shape]


@pytest.mark.parametrize("impl", IMPLS)
def test_ignore_index_may_be_a_token(impl: str) -> None:
    hidden, weight, labels, _ = make_inputs(HeadShape(30, 5, 9), torch.float64)
    labels = labels.clamp(min=0)
    expected = run(hidden, weight, labels.masked_fill(labels == 0, -100), impl="reference")
    torch.testing.assert_close(run(hidden, weight, labels, ignore_index=0, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS + NATIVE)
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
@pytest.mark.parametrize("spread", [1.0, 3e3])
def test_extreme_logits(impl: str, offset: float, spread: float) -> None:
    """Logits up to 1e4, and all strongly negative or positive."""
    hidden, weight, labels, _ = make_inputs(HeadShape(40, 16, 300), torch.float32, spread=spread)
    bias = torch.full((300,), offset)
    found = run(hidden, weight, labels, bias, impl=impl)
    assert all(t.isfinite().all() for t in found)
    assert_as_exact_as_torch((hidden, weight, labels, bias), torch.randn(40), impl)


@pytest.mark.parametrize("impl", IMPLS + NATIVE)
@pytest.mark.parametrize("shape", [HeadShape(200, 1, 3), HeadShape(7, 33, 2), HeadShape(40, 16, 300)], ids=str)
def test_saturated_softcap(impl: str, shape: HeadShape) -> None:
    """Where a softcap saturates, 1 - tanh^2 must not lose more than torch does, with a frozen head too."""
    hidden, weight, labels, _ = make_inputs(shape, torch.float32, spread=30.0)
    options = {"softcap": 5.0, "temperature": 0.7}
    assert_as_exact_as_torch((hidden, weight, labels, None), torch.randn(shape.T), impl, **options)
    exact = run(hidden.double(), weight.double(), labels, function=torch_logps, **options)[1]
    naive = run(hidden, weight, labels, function=torch_logps, **options)[1]
    hidden.requires_grad_()
    (found,) = torch.autograd.grad(linear_logps(hidden, weight, labels, impl=impl, **options).sum(), hidden)
    unit = 4 * torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (naive - exact).abs().max() + unit


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_may_mask_tokens(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf on the first slices of the vocabulary removes these tokens, and nothing turns into nan."""
    monkeypatch.setattr(slices, "slice_width", lambda *sizes, **kind: 64)
    hidden, weight, _, bias = make_inputs(HeadShape(12, 5, 300), bias=True)
    labels = torch.randint(200, 300, (12,))
    bias[:200] = -torch.inf
    kept = run(hidden, weight[200:], labels - 200, bias[200:], impl="reference")
    logps, dX, dW, db = run(hidden, weight, labels, bias, impl=impl)
    torch.testing.assert_close([logps, dX, dW[200:], db[200:]], kept)
    assert dW[:200].eq(0).all()
    assert db[:200].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs(impl: str) -> None:
    hidden, weight, labels, bias = make_inputs(HeadShape(24, 10, 40), bias=True)
    upstream = torch.randn(48)[::2]
    expected = run(hidden, weight, labels, bias, upstream, impl="reference")
    strided = [
        torch.randn(10, 24).double().T.copy_(hidden),
        torch.randn(40, 20).double()[:, ::2].copy_(weight),
        torch.zeros(24, 2, dtype=torch.int32)[:, 1].copy_(labels),
        torch.randn(80).double()[::2].copy_(bias),
    ]
    leaves = [t.requires_grad_() for t in strided if t.is_floating_point()]
    assert not any(t.is_contiguous() for t in leaves)
    logps = linear_logps(leaves[0], leaves[1], strided[2], bias=leaves[2], impl=impl)
    gradients = torch.autograd.grad(logps, leaves, upstream.double())
    torch.testing.assert_close([logps.detach(), *gradients], expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_runs_have_the_same_bits_and_inputs_stay(frozen: bool) -> None:
    hidden, weight, labels, bias = make_inputs(HeadShape(129, 33, 1000), torch.float32, bias=True)
    before = [t.clone() for t in (hidden, weight, labels, bias)]
    upstream = torch.randn(129)

    def once():
        x = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_(not frozen)
        logps = linear_logps(x, w, labels, bias=bias)
        logps.backward(upstream, retain_graph=True)
        first = x.grad.clone()
        x.grad = None
        logps.backward(upstream)
        assert torch.equal(first, x.grad)
        return logps.detach(), x.grad, w.grad

    for a, b in zip(once(), once(), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, labels, bias), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_double_backward_raises(frozen: bool) -> None:
    hidden, weight, labels, _ = make_inputs(HeadShape(4, 3, 5))
    logps = linear_logps(hidden.requires_grad_(), weight.requires_grad_(not frozen), labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_casts_like_a_product(frozen: bool) -> None:
    hidden, weight, labels, bias = make_inputs(HeadShape(20, 16, 50), torch.float32, bias=True)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logps(hidden, weight, labels, bias=bias)
        logps.sum().backward()
    low = [t.detach().bfloat16() for t in (hidden, weight, bias)]
    expected = run(low[0], low[1], labels, low[2], impl="auto")
    assert logps.dtype == torch.float32
    assert torch.equal(logps, expected[0])
    torch.testing.assert_close(hidden.grad, expected[1].float(), rtol=1e-2, atol=1e-3)
    assert hidden.grad.dtype == torch.float32
    assert frozen or torch.equal(weight.grad, expected[2].float())


def test_no_gradient_needed() -> None:
    hidden, weight, labels, _ = make_inputs(HeadShape(20, 7, 31), torch.float32)
    weight.requires_grad_()
    expected = linear_logps(hidden, weight, labels)
    with torch.no_grad():
        assert torch.equal(linear_logps(hidden, weight, labels), expected)
    for impl in IMPLS:
        with torch.inference_mode():
            inner = [t.clone() for t in (hidden, weight, labels)]
            torch.testing.assert_close(linear_logps(*inner, impl=impl), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_TD": torch.zeros(2, 3, 4)}, r"hidden must have shape \[tokens, features >= 1\]; got \[2, 3, 4\]"),
        ({"weight_VD": torch.zeros(5, 4)}, r"weight must have shape \[vocabulary, 3\].*got \[5, 4\]"),
        ({"weight_VD": torch.zeros(0, 3)}, r"weight must have shape .*got \[0, 3\]"),
        ({"labels_T": torch.zeros(3, dtype=torch.long)}, r"labels must have shape \[2\].*got \[3\]"),
        ({"labels_T": torch.zeros(2)}, "labels must be int64 or int32; got torch.float32"),
        ({"labels_T": torch.tensor([0, 5])}, r"labels must be in \[0, 5\).*got 5 at index 1"),
        ({"labels_T": torch.tensor([-1, 0])}, "got -1 at index 0"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\].*got \[4\]"),
        ({"bias": torch.zeros(5).double()}, "bias must have the dtype of hidden, torch.float32; got torch.float64"),
        ({"weight_VD": torch.zeros(5, 3).half()}, "weight must have the dtype of hidden"),
        ({"weight_VD": torch.zeros(5, 3, device="meta")}, "weight must be on the device of hidden, cpu; got meta"),
        ({"hidden_TD": torch.zeros(2, 3, dtype=torch.int32)}, "hidden must be bfloat16, float16, float32 or float64"),
        ({"softcap": 0.0}, "softcap must be positive and finite, or None; got 0.0"),
        ({"softcap": float("inf")}, "softcap must be positive and finite, or None; got inf"),
        ({"hidden_TD": torch.zeros(2, 0), "weight_VD": torch.zeros(5, 0)}, r"features >= 1\]; got \[2, 0\]"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"logit_scale": float("inf")}, "logit_scale must be finite; got inf"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, native, torch, reference; got 'cuda'"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str) -> None:
    arguments = {
        "hidden_TD": torch.zeros(2, 3),
        "weight_VD": torch.zeros(5, 3),
        "labels_T": torch.zeros(2, dtype=torch.long),
    } | change
    tensors = [arguments.pop(name) for name in ("hidden_TD", "weight_VD", "labels_T")]
    with pytest.raises(ValueError, match=message):
        linear_logps(*tensors, **arguments)


def test_offsets_are_64_bit() -> None:
    """A logits matrix of more than 2^31 elements is never addressed as one: slices stay below the buffer."""
    T, V = 70_000, 65_536
    assert T * V > 2**31
    for cuda, converts in itertools.product((False, True), repeat=2):
        width = slices.slice_width(T, 4096, V, 4, converts=converts, cuda=cuda)
        assert width >= 64
        assert width * T * 4 <= chunks.BUFFER_BYTES
    widths = [s.stop - s.start for s in chunks.even_slices(V, width)]
    assert sum(widths) == V
    assert max(widths) <= width
