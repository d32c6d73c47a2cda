"""``linear_dpo_loss``: every loss, reduction and implementation on the CPU against the plain composition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.shapes import RESPONSE_LENGTHS
from dpo_kernels import LOSS_TYPES, chunks, linear_dpo_loss, linear_logps, preference_loss
from dpo_kernels.linear_dpo import ops, torch_chunks
from dpo_kernels.linear_logps import torch_chunks as logps_chunks
from dpo_kernels.linear_logps.reference import logps as reference_logps

IMPLS = ("torch", "reference")
LOSSES = [*LOSS_TYPES, ("sigmoid", "sft", "bco_pair")]
LONG = RESPONSE_LENGTHS["a long pair between short ones"]


class Case:
    """Inputs of one call, on fresh leaves each time they are asked for."""

    def __init__(self, lengths, D: int = 5, V: int = 23, dtype: torch.dtype = torch.float64, ignored: bool = True):
        T, S = sum(lengths), len(lengths)
        self.hidden = torch.randn(T, D, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(V, D, dtype=torch.float64).to(dtype)
        self.bias = torch.randn(V, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(0, V, (T,))
        if ignored:
            self.labels[torch.rand(T) < 0.15] = -100
        self.cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        wide = torch.promote_types(dtype, torch.float32)
        self.ref = -3 * torch.rand(S, dtype=wide)
        self.pair_weights = torch.rand(S // 2, dtype=wide)

    def leaves(self, dtype: torch.dtype | None = None, trained=(1, 1, 1)) -> list[torch.Tensor]:
        tensors = (self.hidden, self.weight, self.bias)
        copies = [t.detach().clone().to(dtype or t.dtype) for t in tensors]
        return [t.requires_grad_(bool(need)) for t, need in zip(copies, trained, strict=True)]


def compose(case: Case, leaves, *, loss_type, reduction="mean", pair_weights=None, softcap=None, **options):
    """Log-probs, sums, ``preference_loss``, reduction: one plain step after another."""
    hidden, weight, bias = leaves
    logps_T, _ = reference_logps(hidden, weight, case.labels, bias, softcap)
    bounds = list(itertools.pairwise(case.cu.tolist()))
    sums = torch.stack([logps_T[a:b].sum() for a, b in bounds]) if bounds else logps_T
    lengths = torch.tensor([int((case.labels[a:b] != -100).sum()) for a, b in bounds], dtype=torch.int64)
    ref = case.ref.to(sums.dtype)
    out = preference_loss(
        sums[0::2],
        sums[1::2],
        ref[0::2],
        ref[1::2],
        loss_type=loss_type,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
        **options,
    )
    loss = out.loss if pair_weights is None else out.loss * pair_weights.to(sums.dtype)
    if reduction != "none":
        loss = loss.sum() / (max(1, len(bounds) // 2) if reduction == "mean" else 1)
    return loss, out.loss, sums, out.chosen_rewards, out.rejected_rewards


def results(outputs, leaves, upstream) -> list[torch.Tensor]:
    """Outputs, then gradients of the leaves that require one."""
    trained = [t for t in leaves if t.requires_grad]
    gradients = torch.autograd.grad(outputs[0], trained, upstream, materialize_grads=True)
    return [t.detach() for t in outputs] + list(gradients)


def upstream_of(case: Case, reduction: str) -> torch.Tensor:
    pairs = case.pair_weights.shape[0]
    return torch.randn(pairs if reduction == "none" else (), dtype=case.ref.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
def test_every_loss_and_reduction(loss_type, reduction: str, impl: str) -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    options = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": 0.1, "softcap": 4.0}
    options |= {"reduction": reduction, "pair_weights": case.pair_weights}
    upstream = upstream_of(case, reduction)
    leaves = case.leaves()
    expected = results(compose(case, leaves, **options), leaves, upstream)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl=impl, **options)
    assert not any(t.requires_grad for t in out[1:])
    torch.testing.assert_close(results(out, leaves, upstream), expected)


@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
@pytest.mark.parametrize("lengths", RESPONSE_LENGTHS.values(), ids=RESPONSE_LENGTHS)
def test_small_buffers(lengths, loss_type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of 6 rows and D = 5: several chunks, pairs held whole, pairs split for the late scalar."""
    case = Case(lengths)
    monkeypatch.setattr(torch_chunks, "BUFFER_BYTES", 6 * 23 * 8)
    monkeypatch.setattr(logps_chunks, "slice_width", lambda *sizes, **kind: 10)
    monkeypatch.setattr(chunks, "CACHE_BYTES", 2 * 23 * 8)
    upstream = upstream_of(case, "mean")
    leaves = case.leaves()
    expected = results(compose(case, leaves, loss_type=loss_type), leaves, upstream)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], loss_type=loss_type)
    torch.testing.assert_close(results(out, leaves, upstream), expected)


def test_plan_of_chunks() -> None:
    plan, Chunk = chunks.plan_chunks, chunks.Chunk
    cu = [0, *itertools.accumulate((4, 4) * 6)]
    assert plan(cu, 1000, 0) == [Chunk(0, 6, False)]
    assert plan(cu, 40, 0) == [Chunk(0, 3, False), Chunk(3, 3, False)]
    assert plan(cu, 8, 0) == [Chunk(i, 1, False) for i in range(6)]
    assert plan(cu, 7, 8) == [Chunk(i, 1, False) for i in range(6)]
    assert plan(cu, 7, 7) == [Chunk(i, 1, True) for i in range(6)]
    cu = [0, *itertools.accumulate(LONG)]
    assert plan(cu, 10, 20) == [Chunk(0, 1, False), Chunk(1, 1, True), Chunk(2, 1, False)]
    assert plan([0], 10, 20) == []
    assert plan([0] * 9, 10, 20) == [Chunk(0, 4, False)]


@pytest.mark.parametrize("lengths", [(40, 30), (60, 5), (5, 60), (64, 0)])
@pytest.mark.parametrize("loss_type", ["sigmoid", "bco_pair", "orpo"])
def test_late_scalar_of_a_pair_longer_than_the_buffer(lengths, loss_type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both with one unknown per pair and with two; the split must be exercised, not avoided."""
    case = Case((3, 2, *lengths, 1, 6), D=3, V=11)
    monkeypatch.setattr(torch_chunks, "BUFFER_BYTES", 10 * 11 * 8)
    plan = chunks.plan_chunks(case.cu.tolist(), 10, 3)
    assert [chunk.split for chunk in plan] == [False, True, False]
    upstream = upstream_of(case, "sum")
    options = {"loss_type": loss_type, "reduction": "sum", "softcap": 3.0}
    leaves = case.leaves()
    expected = results(compose(case, leaves, **options), leaves, upstream)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl="torch", **options)
    torch.testing.assert_close(results(out, leaves, upstream), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_at_most_twice_that_of_torch(dtype: torch.dtype, impl: str, reduction: str) -> None:
    case = Case((40, 60, 25, 10, 3, 80), D=33, V=777, dtype=dtype)
    case.weight = case.weight / 4
    options = {"loss_type": "sigmoid", "beta": 0.1, "reduction": reduction}
    upstream = upstream_of(case, reduction)
    truth_leaves = case.leaves(torch.float64)
    truth = results(compose(case, truth_leaves, **options), truth_leaves, upstream.double())

    leaves = case.leaves()
    logits = torch.nn.functional.linear(*leaves).float()
    ignored = case.labels == -100
    per_token = logits.log_softmax(-1).gather(1, case.labels.masked_fill(ignored, 0)[:, None])[:, 0]
    sums = torch.stack([t.sum() for t in per_token.masked_fill(ignored, 0).split(case.cu.diff().tolist())])
    naive = preference_loss(sums[0::2], sums[1::2], case.ref[0::2], case.ref[1::2])
    naive_loss = naive.loss.mean() if reduction == "mean" else naive.loss
    theirs = results((naive_loss, naive.loss, sums, *naive[1:]), leaves, upstream)

    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl=impl, **options)
    ours = results(out, leaves, upstream)
    names = ("loss", "pair_losses", "logps", "chosen_rewards", "rejected_rewards", "dX", "dW", "db")
    for name, exact, other, found in zip(names, truth, theirs, ours, strict=True):
        assert found.dtype == other.dtype
        bound = 2 * (other.double() - exact).abs().max() + 4 * torch.finfo(found.dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= bound, name


@pytest.mark.parametrize("trained", [t for t in itertools.product((0, 1), repeat=3) if any(t)])
@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs(impl: str, trained) -> None:
    """What is frozen gets no gradient, and changes no other."""
    case = Case(RESPONSE_LENGTHS["uneven"])
    upstream = upstream_of(case, "mean")
    leaves = case.leaves(trained=trained)
    expected = results(compose(case, leaves, loss_type="sigmoid"), leaves, upstream)
    leaves = case.leaves(trained=trained)
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], impl=impl)
    torch.testing.assert_close(results(out, leaves, upstream), expected)


def test_products_that_are_not_needed_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of one logits product: 3 for training, 2 with a frozen head or hidden, 1 without gradients."""
    case = Case((6, 7, 3, 9), D=8, V=64, dtype=torch.float32, ignored=False)
    unit = 2 * 25 * 8 * 64
    work = []

    def counted(out, a, b, *, accumulate=False):
        work.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        chunks.product_(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(torch_chunks, "product_", counted)
    monkeypatch.setattr(logps_chunks, "product_", counted)

    def products(trained, **options) -> float:
        work.clear()
        hidden, weight, _ = case.leaves(trained=trained)
        out = linear_dpo_loss(hidden, weight, case.labels, case.cu, case.ref, **options)
        if any(trained[:2]):
            out.loss.sum().backward()
        return sum(work) / unit

    assert products((1, 1, 0)) == 3
    assert products((1, 0, 0)) == 2
    assert products((0, 1, 0)) == 2
    assert products((0, 0, 0)) == 1
    assert products((1, 1, 0), reduction="none") == 4
    assert products((1, 0, 0), reduction="none") == 2
    assert products((1, 1, 0), loss_type="aot") == 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(impl: str, reduction: str) -> None:
    case = Case((2, 1, 1, 3), D=3, V=7)

    def loss(hidden, weight, bias):
        out = linear_dpo_loss(
            hidden,
            weight,
            case.labels,
            case.cu,
            case.ref,
            bias=bias,
            softcap=2.0,
            logit_scale=1.2,
            temperature=0.8,
            reduction=reduction,
            pair_weights=case.pair_weights,
            impl=impl,
        )
        return out.loss

    assert torch.autograd.gradcheck(loss, case.leaves())


@pytest.mark.parametrize("loss_type", LOSSES, ids=str)
def test_empty_and_ignored(loss_type) -> None:
    """No rows, no pairs, and nothing but ignored rows: defined values, zero gradients of the right shape."""
    for lengths, ignored in (((), False), ((0, 0, 0, 0), False), ((3, 2, 1, 4), True)):
        case = Case(lengths)
        if ignored:
            case.labels.fill_(-100)
        for reduction in ("mean", "none"):
            leaves = case.leaves()
            out = linear_dpo_loss(
                *leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], loss_type=loss_type, reduction=reduction
            )
            assert out.loss.isfinite().all()
            assert out.logps.eq(0).all()
            gradients = torch.autograd.grad(out.loss.sum(), leaves, materialize_grads=True)
            assert all(g.eq(0).all() and g.shape == t.shape for g, t in zip(gradients, leaves, strict=True))
        if not lengths:
            assert linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, loss_type=loss_type).loss == 0


def test_policy_equal_to_reference_gives_log_two() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], dtype=torch.float32)
    leaves = case.leaves()
    logps = linear_logps(leaves[0], leaves[1], case.labels)
    sums = ops.response_sums(logps.detach(), case.cu)
    out = linear_dpo_loss(leaves[0], leaves[1], case.labels, case.cu, sums)
    torch.testing.assert_close(out.pair_losses, torch.full((3,), 2.0).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.chosen_rewards, torch.zeros(3), atol=1e-5, rtol=0)


def test_saturated_margins() -> None:
    case = Case(RESPONSE_LENGTHS["even"], dtype=torch.float32)
    for sign in (1.0, -1.0):
        case.ref = sign * torch.tensor([1e6, -1e6, 1e6, -1e6])
        leaves = case.leaves()
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref)
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(t.grad.isfinite().all() for t in leaves[:2])
        if sign < 0:
            assert leaves[0].grad.eq(0).all()


def test_float16_keeps_gradients_that_a_loss_scale_saves() -> None:
    """A gradient formed in forward waits for its factor in float32: scaled before it is rounded, not after."""
    case = Case((30, 30), D=16, V=500, dtype=torch.float16, ignored=False)
    case.weight = case.weight / 8
    scale = 2.0**16
    exact_leaves = case.leaves(torch.float64)
    options = {"loss_type": "sigmoid", "beta": 1e-4}
    exact = results(compose(case, exact_leaves, **options), exact_leaves, torch.tensor(scale).double())
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2], **options)
    ours = results(out, leaves, torch.tensor(scale))
    for found, truth in zip(ours[5:], exact[5:], strict=True):
        assert found.dtype == torch.float16
        assert (found.double() - truth).abs().max() <= 2e-3 * truth.abs().max()


def test_retained_graph_and_second_backward() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], dtype=torch.float32)
    leaves = case.leaves()
    out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2])
    first = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    last = torch.autograd.grad(3 * out.loss, leaves)
    for a, b, c, d in zip(kept, first, second, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(3 * out.loss, leaves)


def test_accumulation_leaves_earlier_gradients_alone() -> None:
    """Handing a gradient over must not let a later backward write into it."""
    cases = [Case(RESPONSE_LENGTHS["uneven"], dtype=torch.float32) for _ in range(2)]
    weight = cases[0].weight.clone().requires_grad_()
    separate = []
    for case in cases:
        weight.grad = None
        linear_dpo_loss(case.hidden, weight, case.labels, case.cu, case.ref).loss.backward()
        separate.append(weight.grad.clone())
    weight.grad = None
    losses = [linear_dpo_loss(c.hidden, weight, c.labels, c.cu, c.ref).loss for c in cases]
    sum(losses).backward()
    torch.testing.assert_close(weight.grad, separate[0] + separate[1])


def test_double_backward_raises() -> None:
    case = Case(RESPONSE_LENGTHS["even"])
    leaves = case.leaves()
    for reduction in ("mean", "none"):
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, reduction=reduction)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.loss.sum(), leaves[:2], create_graph=True)


def test_runs_have_the_same_bits_and_inputs_stay() -> None:
    case = Case((40, 60, 25, 10), D=33, V=777, dtype=torch.float32)
    before = [t.clone() for t in (case.hidden, case.weight, case.labels, case.cu, case.ref)]

    def once() -> list[torch.Tensor]:
        leaves = case.leaves()
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2])
        return results(out, leaves, torch.tensor(1.3))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
    after = (case.hidden, case.weight, case.labels, case.cu, case.ref)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_pairs_do_not_depend_on_their_neighbours() -> None:
    """Batched and one by one: same losses, and gradients that add up. ``sft`` gets the batch's mean length."""
    case = Case(RESPONSE_LENGTHS["uneven"], ignored=False)
    for loss_type in ("sigmoid", "ipo", "sft", "orpo"):
        leaves = case.leaves()
        mean_length = case.cu.diff()[0::2].double().mean().item()
        options = {"loss_type": loss_type, "reduction": "sum"}
        whole = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, **options)
        expected = torch.autograd.grad(whole.loss, leaves[:2])
        total, losses = torch.zeros_like(leaves[1]), []
        for pair in range(3):
            start, stop = int(case.cu[2 * pair]), int(case.cu[2 * pair + 2])
            part = linear_dpo_loss(
                leaves[0][start:stop],
                leaves[1],
                case.labels[start:stop],
                case.cu[2 * pair : 2 * pair + 3] - start,
                case.ref[2 * pair : 2 * pair + 2],
                mean_chosen_length=mean_length,
                **options,
            )
            losses.append(part.pair_losses)
            total += torch.autograd.grad(part.loss, leaves[1])[0]
        torch.testing.assert_close(torch.cat(losses), whole.pair_losses)
        torch.testing.assert_close(total, expected[1])


def test_autocast() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"], D=16, dtype=torch.float32)
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref, bias=leaves[2])
    found = results(out, leaves, torch.tensor(1.0))
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = linear_dpo_loss(*low[:2], case.labels, case.cu, case.ref, bias=low[2])
    for a, b in zip(found, results(expected, low, torch.tensor(1.0)), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_non_contiguous_inputs_and_int64_offsets() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    leaves = case.leaves()
    one = torch.ones((), dtype=torch.float64)
    expected = results(linear_dpo_loss(*leaves[:2], case.labels, case.cu, case.ref), leaves[:2], one)
    T, D = case.hidden.shape
    hidden = torch.zeros(D, T).double().T.copy_(case.hidden).requires_grad_()
    weight = torch.zeros(23, 2 * D).double()[:, ::2].copy_(case.weight).requires_grad_()
    ref = torch.zeros(6, 2).double()[:, 0].copy_(case.ref)
    out = linear_dpo_loss(hidden, weight, case.labels.int(), case.cu.long(), ref)
    torch.testing.assert_close(results(out, [hidden, weight], one), expected)


def test_inference_mode() -> None:
    case = Case(RESPONSE_LENGTHS["uneven"])
    expected = linear_dpo_loss(case.hidden, case.weight, case.labels, case.cu, case.ref)
    with torch.inference_mode():
        ref = case.ref.clone()
        out = linear_dpo_loss(case.hidden, case.weight, case.labels, case.cu, ref)
    torch.testing.assert_close([t.clone() for t in out], list(expected))
    leaves = case.leaves()
    linear_dpo_loss(*leaves[:2], case.labels, case.cu, ref).loss.backward()
    assert leaves[1].grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_responses": torch.tensor([0, 4])}, r"cu_responses must have shape \[responses \+ 1\].*got \[2\]"),
        ({"cu_responses": torch.tensor([0.0, 2, 4])}, "cu_responses must be int32 or int64; got torch.float32"),
        ({"cu_responses": torch.tensor([0, 2, 5])}, r"rise from 0 to the number of rows, 4; got \[0, 2, 5\]"),
        ({"cu_responses": torch.tensor([1, 2, 4])}, "rise from 0 to the number of rows, 4"),
        ({"cu_responses": torch.tensor([0, 5, 4])}, "rise from 0 to the number of rows, 4"),
        ({"ref_logps_S": None}, "sigmoid needs ref_logps_S.*got None"),
        ({"ref_logps_S": torch.zeros(3)}, r"ref_logps_S must have shape \[2\].*got \[3\]"),
        (
            {"cu_responses": torch.zeros(3, dtype=torch.long, device="meta")},
            "cu_responses must be on the CPU.*got meta",
        ),
        (
            {"pair_weights": torch.zeros(1, device="meta")},
            "pair_weights must be on the device of hidden, cpu; got meta",
        ),
        ({"pair_weights": torch.zeros(2)}, r"pair_weights must have shape \[1\].*got \[2\]"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none; got 'avg'"),
        ({"loss_type": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "sft", "mean_chosen_length": -1.0}, "mean_chosen_length must be positive"),
        ({"labels_T": torch.tensor([0, 1, 7, 0])}, r"labels must be in \[0, 5\).*got 7 at index 2"),
        ({"labels_T": torch.zeros(5, dtype=torch.long)}, r"labels must have shape \[4\]"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str, trained: bool) -> None:
    arguments = {
        "hidden_TD": torch.zeros(4, 3),
        "weight_VD": torch.zeros(5, 3, requires_grad=trained),
        "labels_T": torch.zeros(4, dtype=torch.long),
        "cu_responses": torch.tensor([0, 2, 4]),
        "ref_logps_S": torch.zeros(2),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(**arguments)
