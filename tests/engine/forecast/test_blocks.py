"""What is counted without data of fused blocks, divided packs and float32 experts, beside what real tensors hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from engine import mesh
from engine.errors import UserError
from engine.forecast import Target
from engine.forecast.blocks import no_launches
from engine.forecast.counting import Shapes
from engine.forecast.divided import divided
from engine.forecast.memory import forecast_pack, pack_of
from engine.model import load_policy
from engine.model.kernels import compiled
from engine.model.kernels.choice import use_kernels
from engine.model.kernels.exchange import Kernels
from engine.model.policy import Layout
from tests.engine.forecast.large import groups, run_config, save_config
from tests.engine.forecast.test_counting import MIXTURE, SMALL

CPU = torch.device("cpu")
ABSENT = Target.of_kind("cuda", 1)
TWO_LAYERS = {"num_hidden_layers": 2}
PLAIN = {"dtype": "float32", "attention": "sdpa"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    models = {"dense": {**SMALL, **TWO_LAYERS}, "mixture": {**MIXTURE, **TWO_LAYERS}}
    return {name: save_config(path / name, **values) for name, values in models.items()}


def counted(config, target=ABSENT) -> int:
    with divided(config.train.context_parallel, lambda: small_pack(config)) as pack:
        return Shapes(config, pack, target, Layout(), False).count(None).activations


def small_pack(config):
    return pack_of(config, groups(1024, prompt=128, response=64), Layout())


def held(config, backend="") -> int:
    """Bytes that autograd saves of a forward pass on tensors with data, weights apart."""
    policy = load_policy(config.model, device=CPU, empty=True).train()
    if config.model.kernels == "compile":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "BACKEND", backend)
            use_kernels(policy, Kernels("compile"))
            return saved_bytes(policy, small_pack(config).batch)
    return saved_bytes(policy, small_pack(config).batch)


def saved_bytes(policy, batch) -> int:
    weights = {p.untyped_storage().data_ptr() for p in [*policy.parameters(), *policy.buffers()]}
    saved: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), policy.autocast():
        policy.hidden_states(batch)
    return sum(saved.values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_compiled_blocks_keep_what_is_counted(backend, folders):
    """Less than the model's own, as the compiler divides them, and as the code has it that it generates."""
    config = run_config(folders["dense"], **PLAIN, kernels="compile")
    torch._dynamo.reset()
    compiled._compile.cache_clear()
    found = counted(config)
    assert found == pytest.approx(held(config, backend), rel=0.03)
    assert found < 0.8 * counted(replace(config, model=replace(config.model, kernels="none")))


def test_blocks_are_the_models_own_unless_others_are_asked_for(folders):
    """What auto takes is tried on a device; by name, what cannot be used is an error as in a run."""
    auto, none = (counted(run_config(folders["dense"], kernels=kernels)) for kernels in ("auto", "none"))
    assert auto == none
    config = run_config(folders["mixture"], kernels="compile", train={"gradient_checkpointing": "selective"})
    with pytest.raises(UserError, match=r"^model\.kernels=compile cannot be used: none of its blocks .* to auto$"):
        counted(config)


def test_float32_experts_are_counted(folders):
    config = run_config(folders["mixture"], **PLAIN)
    # Hidden states of the last layer, which nothing saves, are alive as well.
    assert counted(config) == pytest.approx(held(config), rel=0.05)
    assert forecast_pack(config, groups(1024), several=True, target=Target.on(CPU)).step_peak > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_of_several_processes_keeps_its_part_of_a_pack(ranks, folders):
    """Its tokens outside attention, and inside all tokens of its heads; four processes have two key heads repeated."""
    whole = run_config(folders["dense"], **PLAIN)
    parts = replace(whole, train=replace(whole.train, context_parallel=ranks))
    keys = SMALL["num_key_value_heads"] * SMALL["hidden_size"] // SMALL["num_attention_heads"]
    # Of keys and values, as they were given to the exchange and as it gave them.
    repeated = 2 * 2 * 2 * 4 * 1024 * keys * (ranks // 2 - 1) // ranks
    assert mesh.context_size() == 1
    assert counted(parts) == pytest.approx(counted(whole) / ranks + repeated, rel=0.1)
    assert mesh.context_size() == 1


def test_kernels_of_triton_are_told_and_not_run():
    """A library allocates in Python what its kernels fill, so its shapes are known without them."""
    triton = pytest.importorskip("triton")

    @triton.jit
    def kernel(out, x, n, BLOCK: int):
        pass

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = torch.empty_like(x)
            kernel[(1,)](out, x, x.numel(), BLOCK=128)
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx, grad):
            kernel[(1,)](grad, *ctx.saved_tensors, grad.numel(), BLOCK=128)
            return grad

    seen = []
    tuned = triton.autotune([triton.Config({})], key=["n"])(kernel)
    with FakeTensorMode(), no_launches(seen.append):
        Doubled.apply(torch.empty(256, requires_grad=True)).sum().backward()
        tuned[(1,)](torch.empty(4), torch.empty(4), 4, BLOCK=1)
    assert [[x.numel() for x in arguments if isinstance(x, torch.Tensor)] for arguments in seen] == [[256] * 2] * 2 + [
        [4, 4]
    ]
