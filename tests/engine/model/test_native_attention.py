"""Attention in C++ gives what scores in the open give, to the bit in every run, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from dpo_kernels import native
from engine.errors import BackendError, UserError
from engine.model.attention import Backend, choice, choose_backend, interface, register_backends
from engine.model.attention import native as backend
from engine.model.attention.scores import Scores
from engine.model.attention.segments import open_attention
from engine.model.checks import check_packing
from engine.model.load import disable_dropout
from engine.model.policy import Policy
from engine.packing import build_batch
from engine.packing.layout import AttentionPlan, Segment, plan_attention
from tests.engine.model.families import FAMILIES, tiny_model
from tests.engine.model.test_attention import one_by_one, random_groups

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_library = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))

# Three responses of one prompt, one of them a token long, prefixes of two lengths, sequences of one token and of two.
SHORT = [
    Segment(0, 90, 0, 0), Segment(90, 130, 0, 30), Segment(130, 131, 0, 30), Segment(131, 150, 0, 17),
    Segment(150, 151, 150, 150), Segment(151, 168, 151, 151), Segment(168, 169, 151, 152),
]  # fmt: skip
# Several blocks of keys, and more items than one task of the forward pass takes.
LONG = [Segment(0, 600, 0, 0), Segment(600, 1137, 0, 531)]


class Shape(NamedTuple):
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    segments: list[Segment] = SHORT
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False


SHAPES = {
    "grouped": Shape(4, 2, 32, 32),
    "eight for one, window": Shape(8, 1, 16, 16, window=7),
    "odd widths": Shape(3, 3, 20, 13, window=35),
    "width 8, one key a window": Shape(2, 2, 8, 8, window=1),
    "width 256": Shape(2, 1, 256, 256),
    "width 1": Shape(2, 1, 1, 1),
    "capped": Shape(2, 2, 64, 64, softcap=2.0),
    "capped, sinks, window": Shape(8, 2, 80, 80, window=20, softcap=2.0, sinks=True),
    "sinks": Shape(8, 8, 24, 24, sinks=True),
    "long": Shape(2, 1, 64, 64, segments=LONG),
    "long, window, sinks": Shape(4, 4, 33, 33, segments=LONG, window=300, sinks=True),
}


def native_attention(query, key, value, plan, *, chunk=None, **options) -> torch.Tensor:
    """With its options as keywords, as attention in the open has them."""
    return backend.native_attention(query, key, value, plan, Scores(chunk=chunk, **options))


class Problem:
    """Random inputs, as a model hands them on: [1, heads, T, width] of memory in the order of tokens."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32, scale: float = 1.0):
        generator = torch.Generator().manual_seed(0)
        self.plan = plan_attention(shape.segments)
        self.options = {"scaling": shape.key_dim**-0.5, "window": shape.window, "softcap": shape.softcap}
        tokens = shape.segments[-1].stop
        sizes = ((shape.heads, shape.key_dim), (shape.key_heads, shape.key_dim), (shape.key_heads, shape.value_dim))
        draw = [torch.randn(1, tokens, *size, generator=generator).transpose(1, 2) for size in sizes]
        draw[0] *= scale
        draw += [torch.randn(shape.heads, generator=generator)] if shape.sinks else []
        self.inputs = [x.to(dtype) for x in draw]
        self.upstream = torch.randn(1, tokens, shape.heads, shape.value_dim, generator=generator).to(dtype)

    def run(self, attend, dtype: torch.dtype | None = None, **more) -> list[torch.Tensor]:
        """The output and the gradients of all inputs."""
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in self.inputs]
        sinks = inputs[3] if len(inputs) == 4 else None
        output = attend(*inputs[:3], self.plan, **self.options, sinks=sinks, **more)
        return [output.detach(), *torch.autograd.grad(output, inputs, self.upstream.to(output.dtype))]


@pytest.fixture(params=native.ISAS)
def isa(request) -> Iterator[str]:
    if request.param not in native.isas():
        pytest.skip(f"this processor has no {request.param}")
    with native.use_isa(request.param):
        yield request.param


def assert_as_exact(problem: Problem) -> None:
    """At most twice as far from float64 as scores in the open in the same dtype, in the sum of squares."""
    found, same_dtype = problem.run(native_attention), problem.run(open_attention)
    exact = problem.run(open_attention, torch.float64)
    for name, got, plain, want in zip(
        ("output", "query", "key", "value", "sinks"), found, same_dtype, exact, strict=False
    ):
        error, allowed = ((x.double() - want).norm() for x in (got, plain))
        # a few numbers may be rounded right by luck
        least = torch.finfo(got.dtype).eps * want.norm() if name == "sinks" else 0.0
        assert got.dtype == plain.dtype
        assert error <= 2 * allowed + least, (name, error.item(), allowed.item())


@needs_library
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", backend.DTYPES, ids=str)
def test_output_and_gradients_are_exact(isa, shape, dtype):
    assert_as_exact(Problem(shape, dtype))


@needs_library
def test_large_scores_are_exact(isa):
    assert_as_exact(Problem(SHAPES["long, window, sinks"], scale=100.0))
    assert_as_exact(Problem(SHAPES["capped"], scale=100.0))


@needs_library
def test_chunks_are_windows_that_do_not_move(isa):
    problem = Problem(SHAPES["grouped"])
    found = problem.run(native_attention, chunk=16)
    cut = [Segment(s, min(s + 16, stop), s, s) for start, stop, *_ in SHORT[:1] for s in range(start, stop, 16)]
    problem.plan = plan_attention(cut)
    problem.inputs = [x[:, :, :90] for x in problem.inputs]
    problem.upstream = problem.upstream[:, :90]
    # rows of the first segment alone: its keys also serve the others
    torch.testing.assert_close(problem.run(open_attention)[0], found[0][:, :90], atol=2e-6, rtol=2e-6)


@needs_library
@pytest.mark.parametrize("name", ["grouped", "capped, sinks, window", "long, window, sinks"])
def test_threads_and_runs_change_no_bit(name):
    problem = Problem(SHAPES[name])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(problem.run(native_attention))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_and_infinity_pass_as_in_the_open(isa, which, value):
    problem = Problem(SHAPES["grouped"])
    # the first row of a segment, which is all that its other rows have in common
    problem.inputs[which][:, :, 151] = value
    found, plain = problem.run(native_attention)[0], problem.run(open_attention)[0]
    torch.testing.assert_close(found, plain, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert found[:, :151].isfinite().all()
    if which:
        assert not found[:, 151:].isfinite().all()


@needs_library
def test_nan_in_a_response_stays_there(isa):
    problem = Problem(SHAPES["grouped"])
    clean = problem.run(native_attention)
    rows = slice(90, 130)
    for x in problem.inputs[:3]:
        x[:, :, rows] = float("nan")
    found = problem.run(native_attention)
    others = torch.ones(problem.plan.segments[-1].stop, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(found[0][:, others], clean[0][:, others])
    assert torch.equal(found[1][:, :, others], clean[1][:, :, others])
    # gradients of the prompt's keys come from all responses
    others[:30] = False
    for got, want in zip(found[2:], clean[2:], strict=True):
        assert torch.equal(got[:, :, others], want[:, :, others])


@needs_library
def test_any_strides(isa):
    problem = Problem(SHAPES["grouped"])
    want = problem.run(native_attention)
    for i, x in enumerate(problem.inputs):
        problem.inputs[i] = x.repeat_interleave(2, dim=3)[..., ::2] if i else x.contiguous()
    problem.upstream = problem.upstream.transpose(1, 3).contiguous().transpose(1, 3)
    assert all(torch.equal(a, b) for a, b in zip(problem.run(native_attention), want, strict=True))
    # what autograd hands on for a sum
    problem.upstream = torch.ones(()).expand_as(problem.upstream)
    ones = problem.run(native_attention)
    problem.upstream = problem.upstream.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(ones, problem.run(native_attention), strict=True))


def _op_arguments(problem: Problem, **changes) -> dict:
    query, key, value = (x[0].transpose(0, 1).requires_grad_() for x in problem.inputs[:3])
    sinks = problem.inputs[3].float().requires_grad_() if len(problem.inputs) == 4 else None
    segments = torch.tensor(problem.plan.segments)
    options = {"scaling": 0.25, "window": 20, "chunk": 0, "softcap": 2.0}
    return {"query": query, "key": key, "value": value, "sinks": sinks, "segments": segments, **options, **changes}


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", ["grouped", "capped, sinks, window"])
def test_op(name, dtype):
    torch.library.opcheck(backend.packed_attention_op, (), _op_arguments(Problem(SHAPES[name], dtype)))


@needs_library
def test_no_second_derivative():
    arguments = _op_arguments(Problem(SHAPES["grouped"]))
    output, _ = backend.packed_attention_op(**arguments)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), arguments["query"], create_graph=True)


MALFORMED = {
    "a gap": ({"segments": torch.tensor([[0, 9, 0, 0], [10, 169, 10, 10]])}, "do not follow each other: .* 10 .* 9"),
    "an empty segment": ({"segments": torch.tensor([[0, 0, 0, 0], [0, 169, 0, 0]])}, "do not follow each other"),
    "too few": ({"segments": torch.tensor([[0, 9, 0, 0]])}, "segments end at 9, there are 169 tokens"),
    "a prefix in the middle": ({"segments": torch.tensor([[0, 99, 0, 0], [99, 169, 3, 9]])}, "keys 3:9 are not"),
    "a prefix too long": ({"segments": torch.tensor([[0, 99, 0, 0], [99, 169, 0, 100]])}, "keys 0:100 are not"),
    "heads": ({"query": torch.zeros(169, 3, 32)}, "do not match"),
    "tokens": ({"value": torch.zeros(168, 2, 32)}, "do not match"),
    "dtypes": ({"value": torch.zeros(169, 2, 32, dtype=BF16)}, "expected one dtype"),
    "float64": ({n: torch.zeros(169, 2, 32).double() for n in ("query", "key", "value")}, "expected one dtype"),
    "numbers of 32 bits": ({"segments": torch.tensor([[0, 169, 0, 0]], dtype=torch.int32)}, "expected int64 .*int32"),
    "no rows of four": ({"segments": torch.tensor([0, 169, 0, 0])}, r"expected int64 \[segments, 4\]"),
    "a window below 0": ({"window": -1}, "0 .none. or positive, got -1"),
    "sinks": ({"sinks": torch.zeros(3)}, r"expected float32 \[4\] sinks"),
}


@pytest.mark.parametrize(("changes", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        backend.packed_attention_op(**_op_arguments(Problem(SHAPES["grouped"]), **changes))


@needs_library
@pytest.mark.parametrize("sinks", [torch.linspace(-1, 1, 8)[::2], torch.tensor(0.5).expand(4)], ids=["strided", "one"])
def test_sinks_lie_as_they_like(sinks):
    inputs = _op_arguments(Problem(SHAPES["grouped"]))
    found, expected = (
        backend.packed_attention_op(**{**inputs, "sinks": given})[0] for given in (sinks, sinks.clone().contiguous())
    )
    assert torch.equal(found, expected)


def test_no_memory_is_said(monkeypatch):
    def full(name, args):
        args.failed = 1

    monkeypatch.setattr(native, "scratch_bytes", lambda name, args: 0)
    monkeypatch.setattr(native, "call", full)
    with pytest.raises(MemoryError, match="169 tokens"):
        backend.packed_attention_op(**_op_arguments(Problem(SHAPES["grouped"])))


def policy_on(chosen: Backend, model: torch.nn.Module, compute_dtype: torch.dtype = torch.float32) -> Policy:
    register_backends()
    disable_dropout(model)
    model.set_attn_implementation(chosen.implementation)
    return Policy(model, backend=chosen, compute_dtype=compute_dtype)


@needs_library
@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_models_give_what_they_give_one_by_one(family):
    groups, model = random_groups(), tiny_model(family)
    disable_dropout(model)
    expected = torch.cat(one_by_one(model, groups))
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
    (weights * expected).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy = policy_on(Backend("native", "test"), model)
    logps = policy.logps(build_batch(groups))
    (weights * logps).sum().backward()
    torch.testing.assert_close(logps, expected, atol=2e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in grads:
            bound = 1e-4 * max(1.0, grads[name].abs().max().item())
            torch.testing.assert_close(parameter.grad, grads[name], atol=bound, rtol=1e-4)
    check_packing(policy)


@needs_library
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_checkpointing_under_autocast_changes_no_bit(family):
    batch, results = build_batch(random_groups()), []
    for checkpointing in (False, True):
        policy = policy_on(Backend("native", "test"), tiny_model(family).train(), BF16)
        if checkpointing:
            policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy.logps(batch).sum().backward()
        results.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_shapes_alone_go_through():
    policy = policy_on(Backend("native", "test"), tiny_model("llama")).to("meta")
    batch = build_batch(random_groups())
    batch = batch.to("meta")
    assert policy.hidden_states(batch).shape == (batch.num_tokens, policy.config.hidden_size)


def test_a_layer_in_another_dtype_falls_back_alone(monkeypatch, capsys):
    interface._say_once.cache_clear()
    batch = build_batch(random_groups())
    policy = policy_on(Backend("native", "test", ("sdpa",)), tiny_model("llama").double(), torch.float64)
    policy.hidden_states(batch)
    said = capsys.readouterr().out
    assert said.count("attention of LlamaAttention, head dimension 8: sdpa (native does not compute in float64)") == 1
    alone = policy_on(Backend("native", "requested"), tiny_model("llama").double(), torch.float64)
    with pytest.raises(BackendError, match=r"model\.attention=native cannot compute LlamaAttention: native does not"):
        alone.hidden_states(batch)


def test_an_explicit_request_runs_or_says_why_not(monkeypatch):
    if native.library() is not None:
        assert choose_backend("native", CPU, BF16) == Backend("native", "requested")
        with pytest.raises(
            UserError, match=r"^model\.attention=native cannot run here: it does not compute in float64; "
        ):
            choose_backend("native", CPU, torch.float64)
    with pytest.raises(
        UserError, match=r"^model\.attention=native cannot run here: a CPU is needed, and this is cuda; "
    ):
        choose_backend("native", torch.device("cuda"), BF16)
    monkeypatch.setattr(choice.library, "why_not", lambda: "the native extension is not built; run `make`")
    with pytest.raises(UserError) as caught:
        choose_backend("native", CPU, torch.float32)
    assert str(caught.value) == (
        "model.attention=native cannot run here: the native extension is not built; run `make`; "
        "set model.attention to auto"
    )


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_auto_takes_it_on_the_cpu(isa, dtype):
    chosen = choose_backend("auto", CPU, dtype)
    if isa == "plain":
        assert chosen.name == "sdpa"
        assert "native: it has no vector instructions for this processor" in chosen.reason
    else:
        assert (chosen.name, chosen.others) == ("native", ("sdpa",))
        assert chosen.reason == "passed over flash3, flash, varlen, flex: a CUDA device is needed, and this is cpu"


def test_auto_goes_without(monkeypatch):
    monkeypatch.setattr(choice.library, "why_not", lambda: "the native extension is not built; run `make`")
    chosen = choose_backend("auto", CPU, torch.float32)
    assert (chosen.name, chosen.others) == ("sdpa", ())
    assert chosen.reason.endswith("this is cpu; native: the native extension is not built; run `make`")


def test_plans_keep_their_segments():
    plan: AttentionPlan = plan_attention(SHORT)
    assert backend._segments(plan) is backend._segments(plan)
    assert backend._segments(plan).tolist() == [list(s) for s in SHORT]
