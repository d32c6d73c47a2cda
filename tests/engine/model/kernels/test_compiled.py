"""Compiled blocks: the gradients of plain ones, and one compilation for packs of every length."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from engine.config.schema import LoraConfig
from engine.data.groups import PreferenceGroup
from engine.errors import UserError
from engine.model import check_packing
from engine.model.kernels import choice, compiled
from engine.model.kernels.choice import fuse_blocks, kernels_words, use_kernels
from engine.model.kernels.exchange import ABSENT, Change, Kernels
from engine.packing import build_batch
from engine.reference import model_digest
from tests.conformance.families import tiny_config, tiny_model
from tests.engine.model.kernels.policies import assert_close, gradients, packs, policy_of
from tests.engine.model.test_attention import make_policy


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """Nothing compiled is left from or for another test; no code is generated unless a test asks for it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled._compile.cache_clear()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()
    compiled._compile.cache_clear()


@pytest.mark.parametrize(
    ("how", "options", "graphs"),
    [
        pytest.param(False, {"dtype": "float32", "lora": LoraConfig(r=4)}, 7, marks=pytest.mark.slow),
        (True, {}, 4),
        pytest.param("selective", {}, 4, marks=pytest.mark.slow),
    ],
    ids=["adapters", "checkpoints", "selective"],
)
def test_gradients_are_those_of_plain_blocks_and_no_pack_compiles_again(how, options, graphs, tiny_model_dir):
    batches = packs(4, 1, 3, 2)
    policy = policy_of(tiny_model_dir, how=how, **options)
    plain = [gradients(policy, batch) for batch in batches]
    before = model_digest(policy), set(policy.state_dict())
    use_kernels(policy, Kernels("compile"))
    # checkpointing computes anew under the thread and the mode of the backward pass
    gradients(policy, batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, want in zip(batches, plain, strict=True):
            assert_close(gradients(policy, batch), want)
    assert (model_digest(policy), set(policy.state_dict())) == before
    # norm; projections and rotation; the projection behind attention; the rest. Adapters alone give the first block no
    # gradient to hand on.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    policy.exchange.off()
    assert not any("forward" in vars(block) for block in compiled.decoder_blocks(policy))
    assert_close(gradients(policy, batches[0]), plain[0], 0.0)


@pytest.mark.parametrize("tokens", [4, 8, 32])
def test_no_pack_compiles_again_where_tokens_are_as_many_as_features(tokens, tiny_model_dir):
    """Heads, features of a head, and features of the model."""
    policy = policy_of(tiny_model_dir, dtype="float32")
    use_kernels(policy, Kernels("compile"))

    def run(tokens: int) -> None:
        responses = (np.full(1, 5), np.full(tokens // 4, 6))
        prompt = np.full(tokens - sum(map(len, responses)), 7)
        gradients(policy, build_batch([PreferenceGroup(0, prompt, responses)]))

    run(tokens)
    with torch.compiler.set_stance("fail_on_recompile"):
        for other in (tokens + 3, 40, 128):
            run(other)


def test_the_plan_of_a_pack_is_not_compiled_in():
    """Of frozen dataclasses torch 2.11 compiles every field in, such as the number of segments."""
    (batch,) = packs(1)
    assert not torch._dynamo.utils.is_frozen_dataclass(batch.plan)


def test_selective_checkpointing_is_left_to_the_compiler(tiny_model_dir, monkeypatch):
    """It keeps less than plain blocks do, and runs no block twice."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager_decomp_partition")
    (batch,) = packs(4)
    sizes = []
    for kernels in ("none", "compile"):
        policy = policy_of(tiny_model_dir, how=False if kernels == "none" else "selective")
        use_kernels(policy, Kernels(kernels))
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        policy.logps(batch).sum().backward()
        held: dict[int, int] = {}

        def keep(tensor, held=held, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.logps(batch)
        sizes.append(sum(held.values()))
    assert sizes[1] < 0.75 * sizes[0]
    assert not any(block.gradient_checkpointing for block in compiled.decoder_blocks(policy))
    policy.exchange.off()
    assert all(block.gradient_checkpointing for block in compiled.decoder_blocks(policy))


@pytest.mark.parametrize(("family", "mixers"), [("lfm2", True), ("qwen3_moe", False)])
def test_modules_in_rows_and_experts_run_as_they_are_between_compiled_parts(family, mixers, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    policy = make_policy(tiny_model(tiny_config(family)))
    check_packing(policy)
    assert bool(policy.layout.mixers) == mixers
    policy.train()
    (batch,) = packs(4)
    plain = gradients(policy, batch)
    use_kernels(policy, Kernels("compile"))
    assert_close(gradients(policy, batch), plain, 1e-4)
    if not mixers:
        _, sums = policy(batch, policy.logps_of(batch), top_k=2)
        policy.exchange.off()
        _, want = policy(batch, policy.logps_of(batch), top_k=2)
        torch.testing.assert_close(sums, want)


def _wrong(part):
    """Blocks whose output, or whose gradient alone, is off by a quarter."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (1.25 if part == "output" else 1.0)

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.25

    def changes(policy):
        block = compiled.decoder_blocks(policy)[1]
        norm = block.post_attention_layernorm
        plain = type(norm).forward
        return [Change(vars(norm), "forward", ABSENT, lambda x: Off.apply(plain(norm, x)))]

    return changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (_wrong("output"), "it gives other log-probs, by up to .* nats per token"),
        (_wrong("gradient"), r"it gives another gradient of \S+ .* ?in model\.layers\.1"),
    ],
    ids=["output", "gradient"],
)
def test_what_gives_other_numbers_is_refused(changes, words, tiny_model_dir, monkeypatch):
    monkeypatch.setitem(choice.CHANGES, "compile", changes)
    policy = policy_of(tiny_model_dir, dtype="float32", lora=LoraConfig(r=4, dropout=0.5))
    (batch,) = packs(4)
    policy.eval()
    want = policy.logps(batch)
    policy.train()
    with pytest.raises(UserError, match=rf"^model\.kernels=compile cannot be used here: {words}; .*auto$"):
        fuse_blocks(policy, "compile")
    assert policy.training
    assert policy.kernels == Kernels()
    monkeypatch.setattr(choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(choice, "CHANGES", {"compile": changes})
    fuse_blocks(policy, "auto")
    assert kernels_words(policy).startswith("none (passed over compile: it gives")
    policy.eval()
    assert torch.equal(policy.logps(batch), want)


def test_what_does_not_compile_is_one_error_or_passed_over(tiny_model_dir, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    policy = policy_of(tiny_model_dir)
    with pytest.raises(UserError, match=r"^model\.kernels=compile cannot be used here: .*compiler.*") as caught:
        fuse_blocks(policy, "compile")
    assert "\n" not in str(caught.value)
    fuse_blocks(policy, "auto")
    assert kernels_words(policy) == "none (none pays on cpu)"
    monkeypatch.setattr(choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(choice, "CHANGES", {"compile": compiled.compile_changes})
    fuse_blocks(policy, "auto")
    assert kernels_words(policy).startswith("none (passed over compile: ")
    policy.logps(packs(1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", [False, True, "selective"])
@pytest.mark.parametrize("offload", [False, True])
def test_generated_code_gives_the_same_gradients(how, offload, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    policy = policy_of(tiny_model_dir, how=how, dtype="float32")
    batches = packs(4, 2)
    plain = [gradients(policy, batch) for batch in batches]
    fuse_blocks(policy, "compile")
    policy.activation_offload = offload
    gradients(policy, batches[0])
    with torch.compiler.set_stance("fail_on_recompile") if not offload else nullcontext():
        runs = [[gradients(policy, batch) for batch in batches] for _ in range(2)]
    for first, again, want in zip(*runs, plain, strict=True):
        assert_close(first, want)
        assert_close(again, first, 0.0)
