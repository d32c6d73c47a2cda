"""The CUDA backends hand their kernels what these take, and each is chosen only where it runs.

The kernels are stand-ins that refuse what the libraries refuse. All families run on them in ``tests/conformance``.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import BackendError, UserError
from engine.model.attention import Backend, choice, choose_backend, interface, packed_attention, register_backends
from engine.model.checks import check_packing
from engine.model.load import disable_dropout
from engine.model.policy import Policy
from engine.packing import build_batch
from tests.conformance.families import tiny_config
from tests.conformance.families import tiny_model as model_of
from tests.engine.model import stand_ins
from tests.engine.model.families import tiny_model
from tests.engine.model.test_attention import random_groups
from tests.pretended_cuda import CUDA, pretended_cuda

BF16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch):
    stand_ins.install(monkeypatch)
    yield partial(stand_ins.install, monkeypatch)
    monkeypatch.undo()
    choice._probe.cache_clear()


def policy_on(backend: Backend, model: torch.nn.Module) -> Policy:
    register_backends()
    disable_dropout(model)
    model.set_attn_implementation(backend.implementation)
    return Policy(model, backend=backend, compute_dtype=BF16)


def test_signature_of_this_torch_is_in_the_table():
    from torch.nn.attention.varlen import varlen_attn

    minor = ".".join(torch.__version__.split(".")[:2])
    real = inspect.signature(varlen_attn).parameters.values()
    listed = stand_ins.signature(f"torch {minor}").parameters.values()
    assert [(p.name, p.kind, p.default) for p in real] == [(p.name, p.kind, p.default) for p in listed]


REFUSED = {
    "float32": lambda a: a | {"q": a["q"].float(), "k": a["k"].float(), "v": a["v"].float()},
    "mixed dtypes": lambda a: a | {"v": a["v"].half()},
    "head dimension 264": lambda a: a | {n: torch.zeros(*a[n].shape[:2], 264, dtype=BF16) for n in "qkv"},
    "head dimension 12": lambda a: a | {n: torch.zeros(*a[n].shape[:2], 12, dtype=BF16) for n in "qkv"},
    "heads": lambda a: a | {"q": torch.zeros(5, 3, 16, dtype=BF16)},
    "int64 offsets": lambda a: a | {"cu_q": a["cu_q"].long()},
    "offsets with gaps": lambda a: a | {"cu_k": torch.stack([a["cu_k"]] * 2, 1)[:, 0]},
    "a tensor as the longest": lambda a: a | {"max_q": torch.tensor(3)},
    "last dimension with gaps": lambda a: a | {"q": a["q"].repeat_interleave(2, 2)[..., ::2]},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("library", ["flash-attn 3", "flash-attn 3.0.0.b1", "torch 2.11", "torch 2.15"])
def test_stand_ins_refuse(library, change):
    offsets = {"cu_q": torch.tensor([0, 3, 5], dtype=torch.int32), "cu_k": torch.tensor([0, 3, 7], dtype=torch.int32)}
    sizes = {"q": (5, 4, 16), "k": (7, 2, 16), "v": (7, 2, 16)}
    good = {n: torch.ones(size, dtype=BF16) for n, size in sizes.items()} | offsets | {"max_q": 3, "max_k": 4}
    if library.startswith("flash-attn 3"):
        run = partial(stand_ins.flash_function(library), softmax_scale=0.25, causal=True)
    else:
        options = {} if library == "torch 2.11" else {"enable_gqa": True}
        run = partial(stand_ins.varlen_function(library), scale=0.25, window_size=(-1, 0), **options)
    assert run(*good.values()).dtype == BF16
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        run(*change(good).values())


@pytest.mark.parametrize("version", ["torch 2.11", "torch 2.12", "torch 2.14", "torch 2.15"])
def test_every_torch_takes_grouped_heads(kernels, version):
    kernels(version)
    assert choose_backend("varlen", CPU, BF16).name == "varlen"
    batch = build_batch(random_groups())
    losses = {}
    for name in ("sdpa", "varlen"):
        policy = policy_on(Backend(name, "test"), tiny_model("llama"))
        losses[name] = policy.logps(batch)
        losses[name].sum().backward()
        assert all(p.grad is not None for p in policy.parameters())
    torch.testing.assert_close(losses["varlen"], losses["sdpa"], atol=0.1, rtol=0.02)


@pytest.mark.parametrize("version", ["flash-attn 3", "flash-attn 3.0.0.b1"])
def test_every_flash3_takes_the_call(kernels, version, monkeypatch):
    monkeypatch.setattr(
        sys.modules["flash_attn_interface"], "flash_attn_varlen_func", stand_ins.flash_function(version)
    )
    batch = build_batch(random_groups())
    found, expected = (
        policy_on(Backend(name, "test"), tiny_model("llama")).logps(batch) for name in ("flash3", "sdpa")
    )
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "family"),
    [("flash3", "llama"), ("flash", "llama"), ("flash", "gpt_oss"), ("varlen", "llama"), ("varlen", "gpt_oss")],
)
def test_gradients_are_the_same_in_every_run(kernels, name, family):
    batch = build_batch(random_groups())
    policy = policy_on(Backend(name, "test"), tiny_model(family))
    results = []
    for checkpointing in (False, True, True):
        policy.zero_grad()
        if checkpointing:
            policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()
        policy.logps(batch).sum().backward()
        results.append([p.grad.clone() for p in policy.parameters()])
        assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*results, strict=True))


class Copies(TorchDispatchMode):
    """How often rows were gathered, and tensors copied to make them contiguous."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "copies"), [("llama", 0), ("phi3", 0), ("youtu", None)])
@pytest.mark.parametrize("shared", [True, False])
def test_keys_and_values_are_gathered_once_a_layer_and_not_without_a_second_response(
    kernels, monkeypatch, family, copies, shared
):
    model = model_of(tiny_config(family))
    policy = policy_on(Backend("varlen", "test"), model)
    made = interface._varlen_call
    counted = Copies()

    def call(*args):
        with counted:
            return made(*args)

    monkeypatch.setattr(interface, "_varlen_call", call)
    policy.logps(build_batch(random_groups(), share_prompts=shared))
    layers = model.config.num_hidden_layers
    assert counted.counts["index_select"] == (2 * layers if shared else 0)
    if copies is not None:
        assert counted.counts["clone"] + counted.counts["copy_"] == copies


def test_a_tensor_that_kernels_cannot_read_where_it_lies_is_copied():
    x = torch.zeros(5, 4, 24)
    assert interface._readable(x[..., :16]).data_ptr() == x.data_ptr()
    assert interface._readable(x[..., 8:]).data_ptr() == x[..., 8:].data_ptr()
    for unread in (x[..., 4:20], torch.zeros(5, 4, 20)[..., :16], x.transpose(1, 2)):
        assert interface._readable(unread).is_contiguous()


@pytest.mark.parametrize("family", ["mistral", "youtu"])
@pytest.mark.parametrize("name", ["flash3", "flash", "varlen"])
def test_nothing_on_the_way_to_a_kernel_waits_for_the_device(monkeypatch, name, family):
    called = []

    def attend(query, key, value, plan, **options):
        assert plan.cu_seqlens_q.device == plan.cu_seqlens_k.device == query.device == CUDA
        assert type(plan.max_seqlen_q) is type(plan.max_seqlen_k) is int
        called.append(len(query))
        return query + key.sum(0).repeat_interleave(query.shape[1] // key.shape[1], 0) + value.mean()

    kernel = choice.KERNELS[name]._replace(attend=attend)
    monkeypatch.setitem(choice.KERNELS, name, kernel)
    policy = policy_on(Backend(name, "test"), model_of(tiny_config(family)))
    batch = build_batch(random_groups())
    with pretended_cuda() as cuda:
        with cuda.waiting():
            cuda.take(policy)
            batch = batch.to(CUDA)
        policy.hidden_states(batch).sum().backward()
    assert called


def test_deterministic_algorithms_stay_as_the_user_set_them(kernels):
    policy = policy_on(Backend("varlen", "test"), tiny_model("llama"))
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        policy.logps(build_batch(random_groups())).sum().backward()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory == fill
    finally:
        torch.use_deterministic_algorithms(False)


def test_auto_takes_the_first_that_runs(kernels, monkeypatch):
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    assert choose_backend("auto", CPU, BF16) == Backend("flash3", "first choice", ("flash", "varlen", "flex", "sdpa"))
    choice._probe.cache_clear()
    monkeypatch.setattr(choice, "_capability", lambda device: (10, 0))
    backend = choose_backend("auto", CPU, BF16)
    assert (backend.name, backend.others) == ("flash", ("varlen", "flex", "sdpa"))
    assert backend.reason == "passed over flash3: it is for Hopper (compute capability 9.0)"
    assert choose_backend("flash", CPU, BF16).others == ()


INSTALLED = {
    "flash-attn-4 alone": ("flash_attn/cute/__init__.py", "", r"not flash-attn 2: flash-attn-4 alone"),
    "built for another torch": (
        "flash_attn/__init__.py",
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2')",
        r"does not import: .*undefined symbol: _ZN3c105Error",
    ),
    "a library is missing": (
        "flash_attn/__init__.py",
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        r"does not import: .*libcudart",
    ),
    "no such function": ("flash_attn/__init__.py", "", r"does not import: .*flash_attn_varlen_func"),
    "no kernel for this device": (
        "flash_attn/__init__.py",
        "def flash_attn_varlen_func(*args, **kwargs):\n    raise RuntimeError('CUDA error: no kernel image for it')",
        r"fails here: RuntimeError: CUDA error: no kernel image",
    ),
    "another signature": (
        "flash_attn/__init__.py",
        "def flash_attn_varlen_func(q, k, v):\n    return q",
        r"fails here: TypeError: ",
    ),
}


@pytest.mark.parametrize(("path", "text", "reason"), INSTALLED.values(), ids=INSTALLED.keys())
def test_what_does_not_run_is_passed_over_with_the_reason(kernels, monkeypatch, tmp_path, path, text, reason):
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    backend = choose_backend("auto", CPU, BF16)
    assert backend.name == "varlen"
    assert backend.others == ("flex", "sdpa")
    assert backend.reason.startswith("passed over flash3: FlashAttention 3 is not installed; flash: ")
    with pytest.raises(UserError, match=r"^model\.attention=flash cannot run here: .*" + reason) as caught:
        choose_backend("flash", CPU, BF16)
    assert str(caught.value).endswith("; set model.attention to auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4"])
def test_a_layer_beyond_the_largest_head_dimension_falls_back_alone(kernels, family, monkeypatch, capsys):
    interface._say_once.cache_clear()
    model = model_of(tiny_config(family))
    layers = model.get_decoder().layers
    assert [layer.self_attn.head_dim for layer in layers] == [
        512 if k == "full_attention" else 256 for k in _kinds(model)
    ]
    used = []
    run, segments = interface._run_kernel, interface.sdpa_attention
    monkeypatch.setattr(interface, "_run_kernel", lambda *args: used.append(args[0]) or run(*args))
    monkeypatch.setattr(
        interface, "sdpa_attention", lambda *args, **kwargs: used.append("sdpa") or segments(*args, **kwargs)
    )
    policy = policy_on(Backend("flash", "test", ("varlen", "sdpa")), model)
    for _ in range(2):
        policy.logps(build_batch(random_groups())).sum().backward()
    assert used[: len(used) // 2] == ["sdpa" if k == "full_attention" else "flash" for k in _kinds(model)]
    said = capsys.readouterr().out
    assert said.count("head dimension 512: sdpa (flash takes head dimensions up to 256; varlen takes") == 1


def _kinds(model: torch.nn.Module) -> list[str]:
    return list(model.config.get_text_config().layer_types)


@pytest.mark.parametrize(
    ("name", "family", "reason"),
    [
        ("varlen", "gemma2", "cannot cap its scores"),
        ("flash3", "gpt_oss", "has no attention sinks"),
        ("flash", "gemma4_text", "takes head dimensions up to 256"),
        ("varlen", "llama4_text", "attends beyond chunks"),
    ],
)
def test_an_explicit_request_falls_back_for_no_layer(kernels, name, family, reason):
    model = model_of(tiny_config(family))
    policy = policy_on(Backend(name, "requested"), model)
    with pytest.raises(BackendError, match=rf"model\.attention={name} cannot compute \w+: {name} {reason}; .* to auto"):
        check_packing(policy)


def test_a_backend_that_fails_is_blamed_and_not_the_family(kernels, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal instruction was encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", broken)
    policy = policy_on(Backend("flash", "test"), tiny_model("llama"))
    with pytest.raises(BackendError) as caught:
        check_packing(policy)
    message = str(caught.value)
    assert message.startswith("attention backend flash fails in LlamaAttention: RuntimeError: CUDA error: an illegal")
    assert "set model.attention to another of flash3, flash, varlen, flex, native, sdpa" in message
    assert "family" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_a_full_device_is_no_fault_of_a_backend(kernels, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", full)
    with pytest.raises(type(error), match="out of memory"):
        choose_backend("flash", CPU, BF16)
    with pytest.raises(type(error), match="out of memory"):
        check_packing(policy_on(Backend("flash", "test"), tiny_model("llama")))


@pytest.mark.parametrize("weights", [torch.float32, BF16])
@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_large_scores_are_no_fault(kernels, factor, weights):
    """A flash kernel keeps scores in float32, eager attention rounds them: with large ones they differ, both right."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= factor
    policy = policy_on(Backend("flash", "test"), model.to(weights))
    check_packing(policy)
    assert {p.dtype for p in model.parameters()} == {weights}
    assert not any(module._forward_hooks for module in model.modules())


def test_large_scores_hide_no_fault(kernels, monkeypatch):
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 16
    attend = choice.KERNELS["flash"].attend
    wide = choice.KERNELS["flash"]._replace(
        attend=lambda *args, window, **options: attend(*args, window=None, **options)
    )
    monkeypatch.setitem(choice.KERNELS, "flash", wide)
    with pytest.raises(UserError, match="different log-probs on packs"):
        check_packing(policy_on(Backend("flash", "test"), model), requested="shared")


def test_shapes_alone_go_through():
    policy = policy_on(Backend("sdpa", "test"), tiny_model("llama")).to("meta")
    policy.compute_dtype = torch.float32
    batch = build_batch(random_groups()).to("meta")
    assert policy.hidden_states(batch).shape == (batch.num_tokens, policy.config.hidden_size)


def test_missing_plan_is_named():
    model = tiny_model("llama")
    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(UserError, match="LlamaAttention does not pass keyword arguments"):
        packed_attention(("sdpa",), model.model.layers[0].self_attn, query, query, query, attention_plan=None)
