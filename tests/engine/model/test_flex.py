"""FlexAttention gives what scores in the open give, gradients included, and compiles nothing anew for another pack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.errors import BackendError, UserError
from engine.model.attention import Backend, choice, choose_backend, flex, interface, register_backends
from engine.model.attention.scores import Scores
from engine.model.attention.segments import open_attention, sdpa_attention
from engine.model.checks import check_packing
from engine.model.load import disable_dropout
from engine.model.policy import Policy
from engine.model.recompute import checkpointing_options
from engine.packing import build_batch
from engine.packing.layout import Segment, plan_attention
from tests.conformance.families import tiny_config
from tests.conformance.families import tiny_model as model_of
from tests.engine.model import flex_stand_in, stand_ins
from tests.engine.model.test_attention import random_groups

CPU, BF16 = torch.device("cpu"), torch.bfloat16
# Three responses of one prompt, one of them a token long, and sequences of one token and of more than a tile.
SHORT = [Segment(0, 60, 0, 0), Segment(60, 90, 0, 20), Segment(90, 91, 0, 20), Segment(91, 92, 91, 91)]
LONG = [*SHORT, Segment(92, 300, 92, 92), Segment(300, 340, 92, 250)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "chunk": {"chunk": 16},
    "cap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 40, "softcap": 2.0, "sinks": True},
}


@pytest.fixture
def on_cpu(monkeypatch):
    flex_stand_in.install(monkeypatch)
    yield
    monkeypatch.undo()
    flex_stand_in.forget()
    torch._dynamo.reset()


def problem(segments, dtype=torch.float64, *, heads=(4, 2), widths=(16, 16), seed=0, window=None, chunk=None,
            softcap=None, sinks=False):  # fmt: skip
    """Inputs, a plan and options; keys and values with memory in the order of tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = segments[-1].stop
    sizes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])]
    inputs = [torch.randn(tokens, *size, generator=generator, dtype=dtype).transpose(0, 1)[None] for size in sizes]
    inputs += [torch.randn(heads[0], generator=generator, dtype=dtype)] if sinks else []
    inputs = [x.requires_grad_() for x in inputs]
    scores = Scores(scaling=0.3, window=window, softcap=softcap, sinks=inputs[3] if sinks else None, chunk=chunk)
    return inputs, plan_attention(segments), scores


def results(inputs, attend):
    output = attend()
    return [output, *torch.autograd.grad(output, inputs, torch.randn(output.shape, dtype=output.dtype))]


def in_the_open(inputs, plan, scores):
    """Plain attention: capped or with sinks in blocks, else one masked segment after another."""
    options = {"scaling": scores.scaling, "window": scores.window}
    if scores.chunk is not None:
        return sdpa_attention(*inputs[:3], plan, **options, chunk=scores.chunk)
    return open_attention(*inputs[:3], plan, **options, softcap=scores.softcap, sinks=scores.sinks)


@pytest.mark.parametrize(("segments", "name"), [(SHORT, "all"), *((LONG, name) for name in OPTIONS)])
def test_it_gives_what_scores_in_the_open_give(on_cpu, name, segments):
    inputs, plan, scores = problem(segments, **OPTIONS[name])
    torch.manual_seed(0)
    found = results(inputs, lambda: flex.flex_attention(*inputs[:3], plan, scores))
    torch.manual_seed(0)
    want = results(inputs, lambda: in_the_open(inputs, plan, scores))
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("heads", "widths"), [((3, 3), (20, 16)), ((6, 1), (16, 40))], ids=["wide keys", "wide values"]
)
def test_heads_and_widths(on_cpu, heads, widths):
    inputs, plan, scores = problem(SHORT, heads=heads, widths=widths, softcap=2.0)
    found = results(inputs, lambda: flex.flex_attention(*inputs[:3], plan, scores))[0]
    torch.testing.assert_close(found, in_the_open(inputs, plan, scores), atol=1e-12, rtol=1e-12)


def test_no_pack_compiles_again(on_cpu):
    """Lengths, windows, chunks, factors and caps come as tensors. What fits in a tile of tokens is one more graph."""

    def run(shift: int, **options: Any) -> None:
        segments = [Segment(*(x + shift if x else 0 for x in s)) for s in LONG]
        inputs, plan, scores = problem(segments, torch.float32, seed=shift, **options)
        scores = scores._replace(scaling=0.1 + shift / 100)
        flex.flex_attention(*inputs[:3], plan, scores).sum().backward()

    run(0, softcap=2.0)
    assert flex_stand_in.graphs() == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        run(5, softcap=3.0)
        run(129, softcap=30.0, window=11)
        run(40, softcap=30.0, chunk=64)
        with torch.autocast("cpu"):
            run(41, softcap=30.0, chunk=64)
    for length in (16, 50, 4, 128, 2):
        inputs, plan, scores = problem([Segment(0, length, 0, 0)], torch.float32, softcap=2.0)
        flex.flex_attention(*inputs[:3], plan, scores).sum().backward()
    assert flex_stand_in.graphs() == 2


@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [(512, (4, 2), 16), (256, (4, 2), 16), (144, (2, 1), 144), (384, (3, 3), 16)],
    ids=["tiles are heads", "tiles are key heads", "tokens are features", "tiles are all heads"],
)
def test_sizes_that_happen_to_be_equal_compile_nothing_again(on_cpu, tokens, heads, width):
    """As 8192 tokens have as many tiles as a layer of gpt-oss has heads."""

    def run(tokens: int) -> None:
        segments = [Segment(0, tokens - 70, 0, 0), Segment(tokens - 70, tokens, 0, 20)]
        inputs, plan, scores = problem(segments, torch.float32, heads=heads, widths=(width, width), sinks=True)
        flex.flex_attention(*inputs[:3], plan, scores).sum().backward()

    run(tokens)
    with torch.compiler.set_stance("fail_on_recompile"):
        for other in (tokens + 130, 2 * tokens, 640):
            run(other)
    assert flex_stand_in.graphs() == 1


def test_layers_share_a_mask(on_cpu):
    inputs, plan, scores = problem(LONG, torch.float32, window=7)
    for window in (7, None, 7, None):
        flex.flex_attention(*inputs[:3], plan, scores._replace(window=window))
    assert sum(name[0] == "flex" for name in plan.masks) == 2


def test_uncompiled_it_is_refused(on_cpu):
    """It would hold all scores."""
    inputs, plan, scores = problem(SHORT, torch.float32)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="leaves FlexAttention as it is"):
        flex.flex_attention(*inputs[:3], plan, scores)


@pytest.mark.parametrize(
    ("widths", "words"),
    [((8, 16), "takes head dimensions from 16"), ((64, 8), "takes head dimensions from 16"),
     ((264, 64), "takes head dimensions up to 256")],
)  # fmt: skip
def test_widths_that_its_kernels_refuse(on_cpu, widths, words):
    inputs, plan, scores = problem(SHORT, torch.float32, widths=widths)
    assert interface.lack("flex", inputs[0], inputs[2], scores) == words
    if min(widths) < 16:
        with pytest.raises(Exception, match="at least 16"):
            flex.flex_attention(*inputs[:3], plan, scores)


def test_where_it_cannot_run(monkeypatch):
    with pytest.raises(UserError, match=r"^model\.attention=flex cannot run here: a CUDA device is needed"):
        choose_backend("flex", CPU, BF16)
    monkeypatch.setattr(choice, "KERNEL_DEVICES", ("cpu",))
    with pytest.raises(UserError, match="bfloat16 or float16 is needed"):
        choose_backend("flex", CPU, torch.float32)
    assert choose_backend("flex", CPU, BF16) == Backend("flex", "requested")
    with torch._dynamo.config.patch(disable=True), pytest.raises(UserError, match=r"torch\.compile is switched off"):
        choose_backend("flex", CPU, BF16)


def policy_on(backend: Backend, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Policy:
    register_backends()
    disable_dropout(model)
    model.set_attn_implementation(backend.implementation)
    return Policy(model, backend=backend, compute_dtype=dtype)


def family_model(family: str) -> torch.nn.Module:
    """A tiny model with the narrowest heads that products in Triton take."""
    config = tiny_config(family)
    config.head_dim = 16
    return model_of(config)


def steps(name: str, family: str) -> list[torch.Tensor]:
    """Log-probs of three steps, the gradient of the first, and where they lead."""
    torch.manual_seed(0)
    policy = policy_on(Backend(name, "test"), family_model(family).float()).train()
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-2)
    found = []
    for seed in range(3):
        optimizer.zero_grad()
        logps = policy.logps(build_batch(random_groups(seed)))
        logps.mean().backward()
        found.append(logps.detach())
        if not seed:
            found += [p.grad.clone() for p in weights if p.grad is not None]
        optimizer.step()
    return [*found, *(p.detach() for p in weights)]


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama4_text"])
def test_models_go_where_they_go_with_plain_attention(on_cpu, family):
    want = steps("sdpa", family)
    for got, expected in zip(steps("flex", family), want, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_start_up_check_accepts(on_cpu):
    policy = policy_on(Backend("flex", "requested"), family_model("gemma3n_text"))
    check_packing(policy)
    assert policy.layout.kind == "shared"


@pytest.mark.parametrize(("family", "reason"), [("gemma2", "cannot cap its scores"), ("llama4_text", "attends beyond")])
def test_auto_takes_it_for_layers_that_flash_kernels_cannot_compute(on_cpu, family, reason, monkeypatch, capsys):
    stand_ins.install(monkeypatch)
    interface._say_once.cache_clear()
    used = []
    run = interface._run_kernel
    monkeypatch.setattr(interface, "_run_kernel", lambda *args: used.append(args[0]) or run(*args))
    policy = policy_on(Backend("varlen", "test", ("flex", "sdpa")), family_model(family), BF16)
    policy.logps(build_batch(random_groups())).sum().backward()
    assert "flex" in used
    assert f": flex (varlen {reason}" in capsys.readouterr().out
    monkeypatch.undo()
    choice._probe.cache_clear()


def test_what_cannot_be_compiled_is_said_and_passed_over(on_cpu, monkeypatch, capsys):
    """By auto; asked for by name it is an error."""
    interface._say_once.cache_clear()
    monkeypatch.setattr(flex, "BACKEND", lambda graph, inputs: _no_compiler())
    batch = build_batch(random_groups())
    policy_on(Backend("flex", "test", ("sdpa",)), family_model("gemma2")).logps(batch).sum().backward()
    said = capsys.readouterr().out
    assert said.count("sdpa (flex fails here: BackendCompilerFailed: ") == 1
    assert "Failed to find C compiler" in said
    with pytest.raises(BackendError, match="attention backend flex fails in Gemma2Attention"):
        policy_on(Backend("flex", "requested"), family_model("gemma2")).logps(batch)


def _no_compiler():
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


@pytest.mark.parametrize("how", [True, "selective"])
def test_checkpoints(on_cpu, how, monkeypatch):
    """What runs again finds the mask of its pack, and the choice of a backend disturbs no checkpoint."""
    # as in a real backend, the backward pass is traced when the forward pass is compiled, inside the checkpoint's hooks
    monkeypatch.setattr(flex, "BACKEND", "aot_eager")

    def gradients(checkpointing: bool):
        torch.manual_seed(0)
        policy = policy_on(Backend("flex", "test", ("sdpa",)), family_model("gemma2")).train()
        if checkpointing:
            policy.causal_lm.gradient_checkpointing_enable(checkpointing_options(how))
        flex._try.cache_clear()
        policy.logps(build_batch(random_groups())).sum().backward()
        return [p.grad for p in policy.parameters()]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want)


def saved_bytes(run) -> dict[torch.Size, int]:
    """Bytes of what ``run`` leaves for its backward pass, by shape; of masks and numbers nothing."""
    held: dict[int, torch.Tensor] = {}

    def keep(tensor):
        held[id(tensor.untyped_storage())] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return {x.shape: x.numel() * x.element_size() for x in held.values() if x.is_floating_point() and x.ndim}


@pytest.mark.parametrize("sinks", [False, True])
def test_shapes_alone_hold_what_is_compiled(on_cpu, sinks, monkeypatch):
    """As a backend cuts it into a forward and a backward graph."""
    monkeypatch.setattr(flex, "BACKEND", "aot_eager_decomp_partition")
    given = {"softcap": 2.0, "sinks": sinks}
    inputs, plan, scores = problem(LONG, BF16, heads=(5, 1), widths=(16, 24), **given)
    compiled = saved_bytes(lambda: flex.flex_attention(*inputs[:3], plan, scores).sum())
    with FakeTensorMode():
        inputs, _, scores = problem(LONG, BF16, heads=(5, 1), widths=(16, 24), **given)
        output = flex.flex_attention(*inputs[:3], plan, scores)
        assert saved_bytes(lambda: flex.flex_attention(*inputs[:3], plan, scores)) == compiled
        grads = torch.autograd.grad(output.sum(), inputs)
    assert [x.shape for x in grads] == [x.shape for x in inputs]
    assert output.shape == (1, LONG[-1].stop, 5, 24)
